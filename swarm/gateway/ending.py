"""The gateway's end, and waits that give way to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from swarm.errors import SwarmError


class GatewayEnds(SwarmError):
    """Somebody stops the gateway: nothing more is generated."""

    code, retryable, http_status = "gateway_ends", True, 503


class Ending:
    """For the event loop's thread."""

    def __init__(self) -> None:
        self._begun = False
        self._waits: set[asyncio.Timeout] = set()

    def begin(self) -> None:
        """Once: what waits now raises, and so does every wait from now on."""
        self._begun = True
        now = asyncio.get_running_loop().time()
        for wait in self._waits:
            wait.reschedule(now)

    @asynccontextmanager
    async def not_begun(self) -> AsyncIterator[None]:
        """Raises :class:`GatewayEnds` in place of waiting on."""
        error = GatewayEnds("the gateway is being stopped")
        if self._begun:
            raise error
        try:
            async with asyncio.timeout(None) as wait:
                self._waits.add(wait)
                try:
                    yield
                finally:
                    self._waits.discard(wait)
        except TimeoutError:
            if wait.expired():
                raise error from None
            raise
