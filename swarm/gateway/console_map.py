"""The swarm as the console shows it: rows for peers, cells for layers, everything already in words. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from swarm.commands.status import STALE_S, Status
from swarm.coverage import nobody_serves
from swarm.types import Announcement, LayerRange, PeerId, PeerState

TICKS = 6
"""Layer numbers written along the axis, about."""


@dataclass(frozen=True, slots=True)
class PeerRow:
    peer_id: PeerId
    short: str
    own: str
    """What this gateway calls it if it started it; else empty."""
    state: PeerState
    layers: LayerRange
    moving_to: LayerRange | None
    token: str
    """Time of one token through its layers."""
    queue: str
    sessions: int
    kv: str
    memory: str
    kind: str
    age: str
    stale: bool
    version: str
    relay: bool


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring layers that equally many peers serve."""

    start: int
    length: int
    count: int
    level: int
    """0 to 3, for the colour."""


@dataclass(frozen=True, slots=True)
class SwarmMap:
    model: str
    name: str
    num_layers: int
    precision: str
    rows: tuple[PeerRow, ...]
    runs: tuple[Run, ...]
    ticks: tuple[int, ...]
    complete: bool
    sentence: str
    missing: tuple[LayerRange, ...]
    nobody: str
    """Which layers nobody serves, in words; empty if there are none."""
    pill: str


def swarm_map(status: Status, own: Mapping[str, str]) -> SwarmMap:
    """``own``: peer ids that this gateway started, with the names it has for them."""
    profile, coverage = status.profile, status.coverage
    served = sum(1 for count in coverage.counts if count)
    peers = f"{len(status.peers)} peer{'' if len(status.peers) == 1 else 's'}"
    return SwarmMap(
        model=profile.model_id,
        name=profile.name,
        num_layers=profile.num_layers,
        precision=profile.precision,
        rows=tuple(_row(a, age_s, own) for a, age_s in status.peers),
        runs=tuple(_runs(coverage.counts)),
        ticks=ticks(profile.num_layers),
        complete=coverage.complete,
        sentence=coverage.sentence(),
        missing=coverage.missing,
        nobody="" if coverage.complete else nobody_serves(coverage.missing),
        pill=f"{peers}, {'all' if coverage.complete else f'{served} of'} {profile.num_layers} layers",
    )


def ticks(num_layers: int) -> tuple[int, ...]:
    """First layers to write along the axis: round steps, and never one that runs into the last."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if num_layers / s <= TICKS)
    return tuple(range(0, num_layers - step // 2, step))


def _row(a: Announcement, age_s: float, own: Mapping[str, str]) -> PeerRow:
    return PeerRow(
        peer_id=a.peer.peer_id,
        short=a.peer.peer_id[-6:],
        own=own.get(a.peer.peer_id, ""),
        state=a.state,
        layers=a.layers,
        moving_to=a.moving_to if a.moving_to != a.layers else None,
        token=_ms(a.token_s(a.layers)),
        queue=_ms(a.queue_s) if a.queue_s >= 0.0005 else "",
        sessions=a.sessions,
        kv=_count(a.kv_tokens_free),
        memory=f"{a.memory_mb / 1000:.1f} GB" if a.memory_mb else "",
        kind="GPU" if a.gpu else "CPU",
        age="?" if math.isinf(age_s) else f"{age_s:.0f} s",
        stale=age_s > STALE_S,
        version=a.version,
        relay=a.peer.relayed,
    )


def _ms(seconds: float) -> str:
    ms = 1e3 * seconds
    return f"{ms:.1f} ms" if ms < 100 else f"{ms:,.0f} ms"


def _count(number: int) -> str:
    return str(number) if number < 1000 else f"{number / 1000:.0f}k" if number < 1_000_000 else f"{number / 1e6:.1f}M"


def _runs(counts: Sequence[int]) -> list[Run]:
    runs: list[Run] = []
    for layer, count in enumerate(counts):
        if runs and runs[-1].count == count:
            last = runs.pop()
            runs.append(Run(last.start, last.length + 1, count, last.level))
        else:
            runs.append(Run(layer, 1, count, min(count, 3)))
    return runs
