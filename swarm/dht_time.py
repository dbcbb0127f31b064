"""The time by which records on the DHT expire: this machine's clock, put right by the others' where it is wrong.

Expirations are points in time, so announcements of a peer whose clock is minutes off would be refused as expired, or as
lasting too long. Every ping tells the other's time. Who joins takes over the median of what the initial peers say;
later its own clock has a vote, too, so that two who joined through each other meet in between instead of swapping.
Pings by nodes that have put theirs right carry the time put right: a swarm has one time, if not the world's.

hivemind has one such clock for a process (``get_dht_time``), so there is one here: :data:`dht_time`.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterable

log = logging.getLogger(__name__)

TOLERANCE_S = 5.0
"""Clocks that differ by less are let be: a ping's answer may take as long as ``timeouts.connect_s``."""
EARLIEST, LATEST = 1e9, 1e11
"""Unix times that a peer may have, in the years 2001 to 5138."""


class DhtTime:
    """Call it for the Unix time that the swarm has."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._joined = False
        self.offset_s = 0.0
        """What is added to this machine's clock; 0 where that is right."""

    def __call__(self) -> float:
        return self._clock() + self.offset_s

    def agree(self, others_s: Iterable[float]) -> None:
        """``others_s``: how far others that were asked just now are ahead of this time."""
        now = self()
        votes = [ahead_s for ahead_s in others_s if EARLIEST < now + ahead_s < LATEST]  # NaN compares false
        if not votes:
            return
        if self._joined:
            ahead_s = statistics.median([0.0, *votes])
        else:  # of two in the middle the one that is nearer: the other may be as wrong as it likes
            ahead_s = min(statistics.median_low(votes), statistics.median_high(votes), key=abs)
        self._joined = True
        if abs(ahead_s) > TOLERANCE_S:
            self.offset_s += ahead_s
            log.warning("our clock is %s; the swarm's time is used", self.difference() or "as the swarm's again")

    def difference(self) -> str | None:
        """How wrong this machine's clock is, as the end of a sentence; ``None`` if it is right."""
        if abs(self.offset_s) <= TOLERANCE_S:
            return None
        return f"{abs(self.offset_s):.0f} s {'behind' if self.offset_s > 0 else 'ahead of'} the swarm's"


dht_time = DhtTime()
"""Of this process."""
