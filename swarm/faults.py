"""Faults for a generation: a seeded schedule of them, and what each one did. Pure; ``swarm.chaos`` carries it out."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from swarm.errors import BadRequest
from swarm.types import LayerRange

KINDS = {
    "kill": "SIGKILL to a peer of the route",
    "freeze": "SIGSTOP to a peer of the route; it wakes up again some tokens later",
    "drain": "SIGTERM to a peer of the route",
    "prefill": "SIGKILL to a peer while the prompt is being computed",
    "two": "SIGKILL to two peers of the route at once",
    "replacement": "SIGKILL to a peer, then to the one that takes its place, while it is being replayed",
    "p2pd": "SIGKILL to the network daemon of a peer of the route",
    "daemon": "SIGKILL to the network daemon of the process that generates",
}


AT_ONCE_S = 0.002
"""Tokens of a draft come with hardly a gap."""
FEWEST_BEFORE = 6
"""Tokens before the last one that is struck at: there are early, middle and late faults."""
MOST_AT_ONCE = 16
"""Tokens that one pass brings, with a draft all of which was right, see ``peers/drafting.py``."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One of ``KINDS``, at a position of the route, when this token has arrived and the next is on its way."""

    kind: str
    hop: int
    token: int
    """-1 for ``prefill``."""
    share: float = 0.0
    """When, as a share of the time of a pass; ``prefill``: of the undisturbed time to the first."""


@dataclass(frozen=True, slots=True)
class Trial:
    sampled: bool
    """Else greedy."""
    faults: tuple[Fault, ...]


@dataclass(slots=True)
class Observation:
    """What one fault did. ``identical`` is about its whole trial."""

    trial: int
    sampled: bool
    kind: str
    token: int
    hit: list[str] = field(default_factory=list)
    """Short peer ids with their layers."""
    stall_s: float | None = None
    """Longest gap between two tokens after it, less the median gap; for ``prefill`` the delay of the first token."""
    replayed: list[tuple[LayerRange, int]] = field(default_factory=list)
    """Layers that were computed again, and for how many positions."""
    identical: bool = False
    note: str = ""


def plan_trials(
    seed: int, kinds: Sequence[str], faults: int, tokens: int, hops: int, *, in_one: bool = False, drafts: bool = False
) -> list[Trial]:
    """The same for the same arguments. Kinds, greedy and sampled, and early, middle and late tokens take turns.

    After the last token that is struck at, and what may come at once with it, one more is always on its way.
    """
    last = tokens - 1 - (MOST_AT_ONCE if drafts else 1)
    for kind in kinds:
        if kind not in KINDS:
            raise BadRequest(f"{kind!r} is no kind of fault; there are: {', '.join(KINDS)}")
    if last < FEWEST_BEFORE or faults < 1 or not kinds:
        raise BadRequest(f"chaos needs at least {FEWEST_BEFORE + tokens - last} tokens and one fault")
    draw = random.Random(seed)
    chosen = list(itertools.islice(itertools.cycle(kinds), faults))
    if in_one:
        at = sorted(draw.sample(range(last + 1), min(faults, last + 1)))
        return [Trial(True, tuple(_fault(kind, token, hops, draw) for kind, token in zip(chosen, at, strict=False)))]
    trials = []
    for index, kind in enumerate(chosen):
        turn = sum(divmod(index, len(kinds)))  # so that they take turns for each kind, too
        token = (0, draw.randrange(1, last), last)[(turn + seed) % 3]
        trials.append(Trial(turn % 2 == 1, (_fault(kind, token, hops, draw),)))
    return trials


def _fault(kind: str, token: int, hops: int, draw: random.Random) -> Fault:
    return Fault(kind, draw.randrange(hops), -1 if kind == "prefill" else token, draw.uniform(0.1, 0.9))


def judge(
    observations: Sequence[Observation],
    tokens: Sequence[int],
    times: Sequence[float],
    expected: Sequence[int],
    *,
    began: float,
    ttft_s: float,
    error: str = "",
) -> None:
    """Fill in what only the end of a trial tells. ``times`` are those of the tokens, ``ttft_s`` is undisturbed."""
    identical = list(tokens) == list(expected) and not error
    gaps = [b - a for a, b in itertools.pairwise(times)]
    median = statistics.median(gaps) if gaps else 0.0
    following = [*(seen.token for seen in observations[1:]), len(gaps)]
    for seen, until in zip(observations, following, strict=True):
        seen.identical = identical
        own = gaps[max(seen.token, 0) : max(until, seen.token + 1)]
        if seen.token < 0:
            seen.stall_s = max(0.0, times[0] - began - ttft_s) if times else None
        else:
            seen.stall_s = max(0.0, max(own) - median) if own else None
        if error:
            seen.note = error
        elif not identical:
            first = next((i for i, (a, b) in enumerate(zip(tokens, expected, strict=False)) if a != b), None)
            seen.note = f"{len(tokens)} tokens" if first is None else f"differs from token {first} on"


def medians(observations: Sequence[Observation]) -> dict[str, float]:
    """Median stall for each kind, in seconds."""
    kinds = dict.fromkeys(seen.kind for seen in observations)
    stalls = {k: [s.stall_s for s in observations if s.kind == k and s.stall_s is not None] for k in kinds}
    return {kind: statistics.median(values) for kind, values in stalls.items() if values}
