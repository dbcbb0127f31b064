"""Memory of failures: how much longer a route through a peer is reckoned to take.

Pure: the clock is an argument. A failure makes a peer less attractive for a time that doubles with each
further failure up to a bound, and until it has announced itself again: one that died stands in old announcements for a
while. Success forgives. Nobody is banned: if the only peer with a layer failed a moment ago, it is still asked.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace

from swarm.paces import Paces
from swarm.prefix import Prefixes
from swarm.types import PeerId

FIRST_PENALTY_S = 5.0
FULL_S = 5.0
"""A peer without room is asked after others for so long."""
PENALTY_COST_S = 10.0
"""What a penalised peer adds to the reckoned time of a token: more than any honest detour costs."""


FORGOTTEN_S = 3600.0
"""Nothing is remembered of a peer so long after its penalty."""
READ_LATE_S = 10.0
"""An announcement may be read for the first time so long after it was made: one that is read so soon after a failure
may be from before."""


@dataclass(frozen=True, slots=True)
class Record:
    failures: int
    until: float
    cause: str
    at: float
    """When the latest was."""


class Health:
    """What one process remembers of others."""

    def __init__(self, max_penalty_s: float) -> None:
        self._max_penalty_s = max_penalty_s
        self._records: dict[PeerId, Record] = {}
        self._full: dict[PeerId, float] = {}
        self.prefixes = Prefixes(secrets.token_bytes(16))
        self.paces = Paces()

    def failed(self, peer: PeerId, cause: str, now: float) -> None:
        """``cause`` is an error code. Failures while a penalty still runs, too, make the next one longer."""
        failures = self._records[peer].failures + 1 if peer in self._records else 1
        penalty = min(FIRST_PENALTY_S * 2 ** min(failures - 1, 30), self._max_penalty_s)
        self._records = {other: record for other, record in self._records.items() if now < record.until + FORGOTTEN_S}
        self._records[peer] = Record(failures, now + penalty, cause, now)

    def full(self, peer: PeerId, now: float) -> None:
        """It has no room, which is no failure: others are preferred for a moment, however often it says so."""
        self._full[peer] = now + FULL_S

    def succeeded(self, peer: PeerId, now: float) -> None:
        """Forgives step by step: one good session undoes one failure, and ends the penalty."""
        record = self._records.get(peer)
        if record is None:
            return
        if record.failures <= 1:
            del self._records[peer]
        else:
            self._records[peer] = replace(record, failures=record.failures - 1, until=now, at=-math.inf)

    def costs_s(self, now: float, age_s: Callable[[PeerId], float] = lambda peer: 0.0) -> dict[PeerId, float]:
        """What each peer that failed lately adds to the reckoned time of a token; ``age_s``: how long ago the newest
        announcement of a peer was read."""
        running = {
            peer: record
            for peer, record in self._records.items()
            if now < record.until or age_s(peer) > now - record.at - READ_LATE_S
        }
        self._full = {peer: until for peer, until in self._full.items() if now < until}
        costs = dict.fromkeys(self._full, PENALTY_COST_S)
        return costs | {peer: PENALTY_COST_S * record.failures for peer, record in running.items()}

    def cause(self, peer: PeerId) -> str | None:
        record = self._records.get(peer)
        return record.cause if record is not None else None
