"""Generations that run through this gateway: admitted, counted, watched, and ended with the request that wants them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict

from swarm.client import AsyncClient, AsyncStream, Generation
from swarm.config import GatewaySettings
from swarm.coverage import Coverage, served
from swarm.errors import NoRoute, SwarmError
from swarm.gateway.ending import Ending
from swarm.gateway.gate import Gate
from swarm.gateway.hub import Began, Ended, GenerationHub, RouteTaken, Source, TokenOut
from swarm.gateway.traces import TraceStore
from swarm.session import RouteChanged
from swarm.transcript import GenerationRequest
from swarm.types import Token

logger = logging.getLogger(__name__)

FRESH_S = 1.0
"""A view of the swarm that shows a gap is read again if it is older than this."""


class LiveGeneration(AsyncIterator[RouteChanged | Token]):
    """One generation: iterate it once for :class:`RouteChanged` and :class:`Token`; then there is :attr:`result`.

    ``async with contextlib.aclosing(live)`` frees its stages however the iteration ends.
    """

    def __init__(
        self,
        generations: Generations,
        reservation: Reservation,
        request: GenerationRequest,
        stop: Sequence[str],
        source: Source,
        generation: str,
    ) -> None:
        self.request = request
        self.source = source
        self.generation = generation
        """Its name in the hub and among the traces."""
        self.result: Generation | None = None
        self._generations = generations
        self._reservation = reservation
        self._stop = stop
        self._events = self._counted()

    async def __anext__(self) -> RouteChanged | Token:
        """Raises :class:`SwarmError`, which is :class:`GatewayEnds` once the gateway ends."""
        async with self._generations.ending.not_begun():
            return await anext(self._events)

    async def aclose(self) -> None:
        await self._events.aclose()

    async def _counted(self) -> AsyncGenerator[RouteChanged | Token, None]:
        """Gives the place back at the end, although the client may still be reading."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            async with contextlib.aclosing(self._watched()) as events:
                async for event in events:
                    yield event
            if self.result is not None:
                self._generations.traces.add(self.generation, self.result.trace)
        finally:
            self._reservation.give_back(loop.time() - began)

    async def _watched(self) -> AsyncGenerator[RouteChanged | Token, None]:
        """Tells the hub."""
        loop, publish, name = asyncio.get_running_loop(), self._generations.hub.publish, self.generation
        began = last = loop.time()
        first: float | None = None
        tokens = rebuilds = 0
        finish_reason, code, message = "cancelled", "", ""
        request = self.request
        publish(Began(name, self.source, len(request.prompt), request.max_tokens, time.time()))
        try:
            stream = AsyncStream(self._generations.client, request, self._stop)
            async with contextlib.aclosing(aiter(stream)) as events:
                async for event in events:
                    now = loop.time()
                    if isinstance(event, RouteChanged):
                        rebuilds += event.reason != "opened"
                        stalled_s = now - last
                        publish(
                            RouteTaken(name, event.epoch, event.route, event.reason, stalled_s, tokens, event.cause)
                        )
                    else:
                        publish(TokenOut(name, event.index, event.token_id, event.text, now - last, event.hops))
                        first, last = now if first is None else first, now
                        tokens += 1
                    yield event
            self.result = stream.result
            finish_reason = stream.result.finish_reason if stream.result is not None else "cancelled"
        except SwarmError as error:
            finish_reason, code, message = "error", error.code, error.message
            logger.warning("generation %s ended early: %s", name[:8], error)
            raise
        finally:
            rate = (tokens - 1) / (last - first) if first is not None and last > first else 0.0
            ttft_s = first - began if first is not None else 0.0
            ended = Ended(name, finish_reason, tokens, rebuilds, ttft_s, rate, code, message)
            publish(ended)
            told = f"{finish_reason} after {tokens} tokens, first after {ttft_s:.2f} s, {rate:.1f} a second"
            fields = {"source": self.source, **asdict(ended)}
            logger.info("generation %s: %s, %d rebuilds", name[:8], told, rebuilds, extra={"fields": fields})


class Reservation:
    """Places for some generations; each :meth:`stream` has one until it ends."""

    def __init__(self, generations: Generations, count: int) -> None:
        self._generations = generations
        self.left = count
        """Places that no generation has given back yet."""

    def stream(
        self, request: GenerationRequest, stop: Sequence[str] = (), *, source: Source, generation: str = ""
    ) -> LiveGeneration:
        """``generation``: its name, for who wants to watch the hub from the beginning; drawn if empty."""
        return LiveGeneration(self._generations, self, request, stop, source, generation or secrets.token_hex(16))

    def give_back(self, held_s: float) -> None:
        self.left -= 1
        self._generations.gate.leave(1, held_s)


class Generations:
    """All generations of a gateway. For the event loop's thread."""

    def __init__(self, client: AsyncClient, hub: GenerationHub, settings: GatewaySettings) -> None:
        self.client = client
        self.hub = hub
        self.gate = Gate(settings.max_concurrent, settings.max_queue, settings.queue_wait_s)
        self.traces = TraceStore(settings.kept_traces)
        """Of the newest generations that ended well."""
        self.ending = Ending()
        self._looking = asyncio.Lock()

    @asynccontextmanager
    async def reserve(self, count: int) -> AsyncIterator[Reservation]:
        """Wait for ``count`` places. Raises ``Busy``, :class:`NoRoute` while layers are missing, or ``GatewayEnds``."""
        async with self.ending.not_begun():
            await self.check_coverage()
            await self.gate.enter(count)
        reservation = Reservation(self, count)
        try:
            yield reservation
        finally:
            self.gate.leave(reservation.left)

    def coverage(self) -> Coverage:
        """By what was last read of the swarm."""
        view = self.client.view
        return served(view.announcements(), self.client.profile, view.check)

    async def check_coverage(self) -> Coverage:
        """Raises :class:`NoRoute`, naming what is missing. Reads the DHT only when something is."""
        coverage = self.coverage()
        if not coverage.complete:
            async with self._looking:  # many requests, one look
                if self.client.view.since_look() > FRESH_S:
                    await self.client.peers()
            coverage = self.coverage()
            if not coverage.complete:
                raise NoRoute(coverage.sentence())
        return coverage
