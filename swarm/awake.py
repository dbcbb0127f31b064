"""Deadlines for what others are to do, counted while this process runs.

A suspended laptop, a job that was stopped, a machine too busy to run us: nobody else is to blame for that time, and
what they said meanwhile waits to be heard.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Self

TICK_S = 0.5
"""Whoever is late by more stood still."""


def _nothing(_: float) -> None:
    pass


class Standstills:
    """A ``with``: notices when this process stands still. Its timer is due all the time, so it is called before any of
    a deadline that passed meanwhile."""

    def __init__(self, noticed: Callable[[float], object] = _nothing) -> None:
        """``noticed`` is told the seconds each time."""
        self._noticed = noticed
        self._stood_s = 0.0

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def take(self) -> float:
        """For how many seconds it stood still since this was asked last."""
        stood_s, self._stood_s = self._stood_s, 0.0
        return stood_s

    def _wait(self) -> None:
        self._due = self._loop.time() + TICK_S
        self._timer = self._loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        late_s = self._loop.time() - self._due
        if late_s > TICK_S:
            self._stood_s += late_s
            self._noticed(late_s)
        self._wait()


@contextlib.asynccontextmanager
async def timeout_awake(seconds: float) -> AsyncIterator[asyncio.Timeout]:
    """As :func:`asyncio.timeout`, but the time in which this process stood still does not count."""
    async with asyncio.timeout(seconds) as scope:

        def noticed(late_s: float) -> None:
            if (deadline := scope.when()) is not None and not scope.expired():
                scope.reschedule(deadline + late_s)

        with Standstills(noticed):
            yield scope
