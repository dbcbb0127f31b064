"""What is under way on the link to another peer, and how fast it gets there. Pure: times are arguments.

A ping goes out behind every frame of a prompt or replay, and its pong tells when all before it has arrived. What the
line carries in :data:`LEAD_S` may be under way, and no more: what other sessions send waits behind it, and so do
heartbeats, in buffers of the system that nobody can look into.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

TELLING_BYTES = 16 * 1024
"""Smaller frames say little of how fast the line is."""
FIRST_BYTES = 64 * 1024
"""May be under way before anything is known of the line."""
LEAD_S = 0.5
FRAME_S = 0.25
"""One frame should not take longer: a decode step may have to wait for it."""
FEWEST_ROWS = 8
"""... but has so many rows, if there are as many."""
RATE_S = 600.0
"""What was measured so long ago is not told any more: planners may have avoided a line that is faster by now."""
SAMPLES = 8
"""Newest measurements that count, of this link and of those before to the same peer."""
BUSY_S = 0.1
"""A frame that took less may have waited for a busy process as well: the line is no slower than that, but how fast?"""
MOST_BYTES_PER_S = 1e9
"""What is measured of a faster line says more of the processes at its ends."""


@dataclass(slots=True)
class Measured:
    """The way to another peer and back."""

    at: float = 0.0
    """When it was measured last, by the loop's clock."""
    round_trips: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    one_way_s: float = 0.0
    rates: deque[tuple[float, bool]] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    """Bytes a second; whether the line is as slow as that."""
    bytes_per_s: float = 0.0
    """0: nothing has gone this way that would tell."""

    rated_at: float = 0.0

    def add(self, round_trip_s: float, at: float) -> None:
        self.at = at
        self.round_trips.append(round_trip_s)
        # The lower quartile: pings that met a busy process, perhaps all of one probe, say nothing of the link.
        self.one_way_s = sorted(self.round_trips)[(len(self.round_trips) - 1) // 4] / 2

    def add_rate(self, size_bytes: int, taken_s: float, at: float) -> None:
        """A frame's."""
        self.rated_at, self.at = at, at if self.round_trips else self.at
        rate, slow = size_bytes / max(taken_s, size_bytes / MOST_BYTES_PER_S), taken_s >= BUSY_S
        self.rates.append((rate if slow else max(rate, self.bytes_per_s), slow))
        # The median: of two pongs that come together, the second seems early.
        self.bytes_per_s, _ = statistics.median_low(self.rates)

    def told_bytes_per_s(self, now: float) -> float:
        """0: not known to be slow."""
        slow = bool(self.rates) and statistics.median_low(self.rates)[1]
        return self.bytes_per_s if slow and now - self.rated_at < RATE_S else 0.0

    @property
    def jitter_s(self) -> float:
        """Mean deviation of :attr:`one_way_s`."""
        middle = self.one_way_s
        return statistics.fmean(abs(sample / 2 - middle) for sample in self.round_trips)

    def frame_rows(self, row_bytes: int) -> int:
        """What one frame should have at most."""
        frame_bytes = int(FRAME_S * self.bytes_per_s) if self.bytes_per_s else FIRST_BYTES
        return max(FEWEST_ROWS, frame_bytes // row_bytes)

    @property
    def lead_bytes(self) -> int:
        """What may be under way."""
        return max(FIRST_BYTES, int((LEAD_S + 2 * self.one_way_s) * self.bytes_per_s))


@dataclass(frozen=True, slots=True)
class _Mark:
    """A ping."""

    number: int
    sent_bytes: int
    """Of all frames before it."""
    size_bytes: int
    """Of the one just before it; 0: it was sent alone."""
    began_at: float
    """When the sending of that frame, or of the ping, began."""
    alone: bool
    """Nothing was under way."""


class Line:
    """One link's. Its frames are those of prompts and replays: those of decode steps wait for nothing."""

    def __init__(self) -> None:
        self.carried = 0
        """Changes as frames arrive."""
        self._sent_bytes = self._arrived_bytes = 0
        """Since the link was opened."""
        self._marks: deque[_Mark] = deque()
        self._arrived_at = 0.0

    @property
    def under_way_bytes(self) -> int:
        return self._sent_bytes - self._arrived_bytes

    @property
    def unmarked(self) -> bool:
        """Something is under way, and no pong will tell when it arrives."""
        known = self._marks[-1].sent_bytes if self._marks else self._arrived_bytes
        return known < self._sent_bytes

    def sent(self, size_bytes: int) -> None:
        """A frame is about to be written."""
        self._sent_bytes += size_bytes

    def pinged(self, number: int, began_at: float, size_bytes: int = 0) -> None:
        alone = not self.under_way_bytes
        self._marks.append(_Mark(number, self._sent_bytes, size_bytes, began_at, alone))

    def ponged(self, number: int, now: float, measured: Measured) -> None:
        """All before this ping has arrived. Adds to ``measured`` what that tells."""
        mark = None
        while self._marks and self._marks[0].number <= number:
            mark = self._marks.popleft()
        if mark is None:
            return
        self.carried += mark.sent_bytes > self._arrived_bytes
        self._arrived_bytes = mark.sent_bytes
        if mark.number == number > 1:  # the first may wait until the remote has accepted the stream
            if mark.size_bytes >= TELLING_BYTES:
                # It did not begin to arrive before what was ahead of it had arrived.
                taken_s = now - max(mark.began_at + 2 * measured.one_way_s, self._arrived_at)
                measured.add_rate(mark.size_bytes, taken_s, now)
            elif mark.alone and not mark.size_bytes:  # else it has waited for what was ahead of it
                measured.add(now - mark.began_at, now)
        self._arrived_at = now
