"""What a generation has ready for a client that may read slowly."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Generic, TypeVar

from swarm.errors import DeadlineExceeded

T = TypeVar("T")


class SlowReader(DeadlineExceeded):
    """The client takes nothing: its generation ends, so that nobody waits for it."""

    code, retryable, http_status = "slow_reader", False, 408


class Buffer(Generic[T]):
    """Items from some tasks to one reader: at most ``limit``, then the writers wait, at most ``patience_s``."""

    def __init__(self, limit: int, patience_s: float) -> None:
        self._limit = limit
        self._patience_s = patience_s
        self._items: deque[T] = deque()
        self._error: BaseException | None = None
        self._filled = asyncio.Event()
        self._room = asyncio.Event()

    async def put(self, item: T) -> None:
        """Raises :class:`SlowReader`."""
        while len(self._items) >= self._limit:
            self._room.clear()
            try:
                async with asyncio.timeout(self._patience_s):
                    await self._room.wait()
            except TimeoutError:
                raise SlowReader(f"nothing was read for {self._patience_s:g} s (gateway.slow_reader_s)") from None
        self._items.append(item)
        self._filled.set()

    def fail(self, error: BaseException) -> None:
        """The reader gets ``error`` next, whatever else is there."""
        self._error = self._error or error
        self._filled.set()

    async def get(self, within_s: float) -> T | None:
        """The next item, None if none comes ``within_s``, or raises what :meth:`fail` was given."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while not self._items and self._error is None:
                    self._filled.clear()
                    await self._filled.wait()
        if self._error is not None:
            raise self._error
        if not self._items:
            return None
        self._room.set()
        return self._items.popleft()
