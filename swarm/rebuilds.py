"""Changes of a session's route: what one of them cost, and how many without any gain are enough."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from swarm.control import HopLost
from swarm.types import Hop, LayerRange

RETRY_FIRST_S = 0.1
RETRY_MOST_S = 1.0
"""Pauses between attempts to find a replacement, doubled from the first to the longest."""


@dataclass(frozen=True, slots=True)
class Rebuild:
    """One change of the route and what it cost, for reports."""

    epoch: int
    token_index: int
    kept: int
    """The committed length (prompt included) to which the surviving stages truncated."""
    reason: str
    lost: tuple[Hop, ...]
    replayed: tuple[tuple[LayerRange, int], ...]
    """New layer ranges with the positions that they had to compute again."""
    duration_s: float


class Patience:
    """With a route that breaks again and again: after ``most`` rebuilds in a row that brought nothing it is over."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._fruitless = 0

    def lost(self, loss: HopLost, *, fruitful: bool) -> None:
        """``fruitful``: the session went on since the last time. Raises the hop's error when patience is at its end."""
        self._fruitless = 0 if fruitful else self._fruitless + 1
        if self._fruitless > self._most:
            raise loss.error from None

    async def pause(self) -> None:
        """Before the next rebuild; the first two don't wait."""
        if self._fruitless > 1:
            await asyncio.sleep(min(RETRY_FIRST_S * 2 ** (self._fruitless - 2), RETRY_MOST_S))
