"""Token times, and what they say. Pure."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from swarm.types import HopTiming


@dataclass(frozen=True, slots=True)
class Run:
    """One generation. ``times`` are seconds from the call to each token."""

    token_ids: list[int]
    """Empty where they are not known: a server sends text."""
    times: list[float]
    hops: list[tuple[HopTiming, ...]] = field(default_factory=list)
    """For each token; empty for a generation without a swarm."""

    @property
    def ttft_s(self) -> float:
        return self.times[0]

    @property
    def gaps(self) -> list[float]:
        return [later - earlier for earlier, later in itertools.pairwise(self.times)]

    @property
    def tokens_per_second(self) -> float:
        """Between the first token and the last; 0 if that is the same one."""
        if len(self.times) < 2:
            return 0.0
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])


@dataclass(frozen=True, slots=True)
class HopShare:
    """Where a token's time goes: medians, in seconds."""

    layers: str
    queue_s: float
    compute_s: float


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of all values don't exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def throughput(runs: Sequence[Run]) -> float:
    """Tokens a second of all runs together while all of them decode: begun at the same moment, on one clock."""
    begin = max(run.times[0] for run in runs)
    end = min(run.times[-1] for run in runs)
    if end <= begin:  # some ended before others began: too short for a steady state
        begin, end = min(run.times[0] for run in runs), max(run.times[-1] for run in runs)
    return sum(begin < at <= end for run in runs for at in run.times) / (end - begin)


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median of the ratios within each round: what slows a machine down for a while slows both."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def hop_shares(runs: Sequence[Run]) -> tuple[list[HopShare], float]:
    """Each hop's queue and compute time, and what is left of the time between tokens: wire and scheduling."""
    steps = [(gap, hops) for run in runs for gap, hops in zip(run.gaps, run.hops[1:], strict=False) if hops]
    if not steps:
        return [], 0.0
    shares = []
    for position, hop in enumerate(steps[0][1]):
        timings = [hops[position] for _, hops in steps if position < len(hops)]
        queue_s = statistics.median(timing.queue_s for timing in timings)
        compute_s = statistics.median(timing.compute_s for timing in timings)
        shares.append(HopShare(str(hop.layers), queue_s, compute_s))
    rest = statistics.median(gap - sum(hop.queue_s + hop.compute_s for hop in hops) for gap, hops in steps)
    return shares, rest
