"""How many generations run at once, and who waits for a place: first come, first served, bounded in number and time."""

from __future__ import annotations

import asyncio
import math
from collections import deque

from swarm.errors import BadRequest, Busy

SMOOTHING = 0.1
"""Weight of the newest generation in how long one typically holds its place."""
LONGEST_RETRY_S = 60


class Full(Busy):
    """Every place is taken. ``retry_after_s``: when to ask again, in whole seconds."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Gate:
    """Places for generations. A request takes as many as it has texts, all at once; they may be left one by one."""

    def __init__(self, places: int, max_queue: int, wait_s: float) -> None:
        self._places = places
        self._max_queue = max_queue
        self._wait_s = wait_s
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._typical_s = 1.0
        """A place is held for so long, running average."""
        self.taken = 0

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def retry_after_s(self) -> int:
        """When a place may be free for one more request."""
        return min(LONGEST_RETRY_S, max(1, math.ceil(self._typical_s * (self.waiting + 1) / self._places)))

    async def enter(self, count: int) -> None:
        """Take ``count`` places. Raises :class:`Full`, or :class:`BadRequest` for more than there ever are."""
        if count > self._places:
            raise BadRequest(f"{count} texts at once; the limit is {self._places} (gateway.max_concurrent)")
        if not self._queue and self.taken + count <= self._places:
            self.taken += count
            return
        if len(self._queue) >= self._max_queue:
            limit = f"gateway.max_queue, {self._max_queue}"
            raise Full(f"too many requests wait already ({limit})", self.retry_after_s)
        await self._wait(count)

    async def _wait(self, count: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((count, turn))
        try:
            async with asyncio.timeout(self._wait_s):
                await asyncio.shield(turn)
        except BaseException as error:
            if turn.done():  # its turn came in the same moment
                self.leave(count)
            else:
                self._queue.remove((count, turn))
                self._admit()
            if isinstance(error, TimeoutError):
                message = f"no place became free within {self._wait_s:g} s (gateway.queue_wait_s)"
                raise Full(message, self.retry_after_s) from None
            raise

    def leave(self, count: int = 1, held_s: float | None = None) -> None:
        """Give places back; ``held_s`` tells how long they were in use."""
        self.taken -= count
        if held_s is not None:
            self._typical_s += SMOOTHING * (held_s - self._typical_s)
        self._admit()

    def _admit(self) -> None:
        while self._queue and self.taken + self._queue[0][0] <= self._places:
            count, turn = self._queue.popleft()
            self.taken += count
            turn.set_result(None)
