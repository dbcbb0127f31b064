"""The search behind :mod:`swarm.routing`: the cheapest chain or ring of candidates over a range of layers.

All costs are linear, so a cheapest route changes peers only where some candidate's range begins or ends, if no peer
serves merely as a relay between two that are badly linked; where there are few candidates, such routes are searched
too: every layer is a boundary. Going through the boundaries in order, ``run[q]`` is the least cost of being at work at
``q``, less its price of all layers before: then entering anywhere and leaving anywhere cost one addition each, and a
boundary costs one min-plus product of those that may leave there with those that may enter.

- *The ring.* What closes it depends on the first peer, so every possible first peer has a lane of its own.
- *Nobody twice.* A route that returns to a peer is forbidden by adding "was used before" to the state, only for those
  peers for which the search tried it (decremental state space relaxation: Righini and Salani, Networks 2008).
- *Thousands of candidates.* With link times estimated from both ends the cost is a sum over hops; forward and backward
  passes over boundaries give, for each candidate, the cost of the best route through it (:func:`through`). The best
  are searched with the true link times, the rest can't be on a better route unless a link is far better than estimated.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from swarm.types import LayerRange

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

FEWEST_LANES = 8
MOST_STATES = 2048
"""First peers that are tried times candidates; below, every possible first peer is tried and the result exact."""
MOST_PAIRS = 400_000
"""Elements of one min-plus product; beyond, only the cheapest of those that leave are looked at."""
FEW_CANDIDATES = 16
"""So many are searched with a boundary at every layer."""
MOST_WATCHED = 6
"""Peers whose earlier use is part of the state: the state grows to 2 to this power."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """Arrays with one entry for each candidate: a peer, or one of the parts that its KV room allows."""

    owner: Ints
    """Candidates of one owner are the same peer."""
    start: Ints
    end: Ints
    fixed_s: Floats
    """For entering it once."""
    layer_s: Floats
    last_s: Floats
    """For being at work at the end of the route."""

    def __len__(self) -> int:
        return len(self.owner)

    def take(self, chosen: Ints) -> Candidates:
        return Candidates(
            self.owner[chosen],
            self.start[chosen],
            self.end[chosen],
            self.fixed_s[chosen],
            self.layer_s[chosen],
            self.last_s[chosen],
        )


@dataclass(frozen=True, slots=True)
class Network:
    """Link costs between candidates ``[from, to]``, 0 within one owner; for a chain also into it and out of it."""

    between: Floats
    back: Floats | None
    """Of a ring, in which the last one sends to the first: only tokens."""
    entry: Floats
    exit: Floats


Leg = tuple[int, int, int]
"""Candidate, first layer, end."""


def bounds_of(candidates: Candidates, wanted: LayerRange) -> Ints:
    """Where a route may change peers, both ends of ``wanted`` included."""
    if len(candidates) <= FEW_CANDIDATES:
        return np.arange(wanted.start, wanted.end + 1, dtype=np.int64)
    ends = np.concatenate([candidates.start, candidates.end, [wanted.start, wanted.end]])
    return np.unique(np.clip(ends, wanted.start, wanted.end)).astype(np.int64)


def through(candidates: Candidates, link_s: Floats, wanted: LayerRange) -> tuple[Floats, list[int]]:
    """For each candidate the cost of the best route through it, and the candidates of one best route.

    ``link_s``: what each candidate adds in links, in and out together. Infinite where there is no route.
    """
    bounds = bounds_of(candidates, wanted)
    start, end, price = candidates.start, candidates.end, candidates.layer_s
    fixed = candidates.fixed_s + link_s
    reach = np.full(len(bounds), np.inf)  # least cost from the beginning to each boundary
    reach[0] = 0.0
    arrived_by = np.zeros(len(bounds), dtype=np.int64)
    entered_at = np.zeros((len(bounds), len(candidates)), dtype=np.int16)
    run = np.full(len(candidates), np.inf)
    entered = np.zeros(len(candidates), dtype=np.int16)
    held = [np.flatnonzero((start <= x) & (end > x)) for x in bounds]  # at work right after each boundary
    for i, x in enumerate(bounds):
        if i:
            done = held[i - 1]  # every range that ends at x or later and began before holds the layer before x
            leave = run[done] + price[done] * x + (candidates.last_s[done] if x == wanted.end else 0.0)
            if len(done):
                arrived_by[i] = done[leave.argmin()]
                reach[i] = leave.min()
            entered_at[i] = entered
        enter = reach[i] + fixed[held[i]] - price[held[i]] * x
        better = enter < run[held[i]]
        run[held[i][better]] = enter[better]
        entered[held[i][better]] = i
    best = np.full(len(candidates), np.inf)
    rest = np.full(len(bounds), np.inf)  # least cost from each boundary to the end
    rest[-1] = 0.0
    run = np.full(len(candidates), np.inf)
    for i in range(len(bounds) - 2, -1, -1):
        x, working = bounds[i + 1], held[i]
        leave = rest[i + 1] + fixed[working] + price[working] * x
        leave += candidates.last_s[working] if x == wanted.end else 0.0
        run[working] = np.minimum(run[working], leave)
        remaining = run[working] - price[working] * bounds[i]
        if len(working):
            rest[i] = remaining.min()
            best[working] = np.minimum(best[working], reach[i] + remaining)
    route: list[int] = []
    i = len(bounds) - 1
    while i > 0 and np.isfinite(reach[i]):
        route.append(int(arrived_by[i]))
        i = int(entered_at[i][route[-1]])
    return best, route


def choose(candidates: Candidates, scores: Floats, needed: list[int], most: int, per_range: int) -> Ints:
    """The ``most`` best-scored candidates, no more than ``per_range`` of one range, with all ``needed`` ones."""
    order = np.lexsort((scores, candidates.end, candidates.start))
    classes = candidates.start[order] * (int(candidates.end.max()) + 1) + candidates.end[order]
    first = np.concatenate([[True], classes[1:] != classes[:-1]])
    rank = np.arange(len(order)) - np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))
    kept = order[(rank < per_range) & np.isfinite(scores[order])]
    kept = kept[np.argsort(scores[kept], kind="stable")[:most]]
    return np.unique(np.concatenate([kept, np.array(needed, dtype=np.int64)]))


@dataclass(slots=True)
class _Trace:
    """What backtracking needs: at each boundary, where each work was begun, and after whom."""

    begun: list[npt.NDArray[np.int16]] = field(default_factory=list)
    after: list[npt.NDArray[np.int16]] = field(default_factory=list)


def search(candidates: Candidates, network: Network, wanted: LayerRange) -> tuple[float, list[Leg]] | None:
    """The cheapest route in which no owner occurs twice; ``None`` if there is none."""
    watched: list[int] = []
    while True:
        found = _search(candidates, network, wanted, watched)
        if found is None:
            return None
        owners = [int(candidates.owner[leg[0]]) for leg in found[1]]
        twice = {owner for owner in owners if owners.count(owner) > 1}
        if not twice:
            return found
        watched += sorted(twice)
        if len(watched) > MOST_WATCHED:  # give up being exact: these are used where they were used first, or not at all
            candidates, watched = _without_return(candidates, found[1], twice), []


def _without_return(candidates: Candidates, legs: list[Leg], twice: set[int]) -> Candidates:
    start, end = candidates.start.copy(), candidates.end.copy()
    for owner in twice:
        _, first, last = next(leg for leg in legs if candidates.owner[leg[0]] == owner)
        for index in np.flatnonzero(candidates.owner == owner):
            start[index] = max(int(start[index]), first)
            end[index] = max(int(start[index]), min(int(end[index]), last))
    return replace(candidates, start=start, end=end)


def _search(
    candidates: Candidates, network: Network, wanted: LayerRange, watched: list[int]
) -> tuple[float, list[Leg]] | None:
    start, end, price = candidates.start, candidates.end, candidates.layer_s
    ring, bounds = network.back is not None, bounds_of(candidates, wanted)
    bit = np.zeros(len(candidates), dtype=np.int64)
    for index, owner in enumerate(watched):
        bit[candidates.owner == owner] = 1 << index
    firsts = np.flatnonzero((start <= wanted.start) & (end > wanted.start))
    if len(firsts) == 0:
        return None
    opening = candidates.fixed_s - price * wanted.start + (0.0 if ring else network.entry)
    if ring:
        reckoned = candidates.fixed_s + price * (end - wanted.start)
        promising = np.argsort(reckoned[firsts] / (end[firsts] - wanted.start), kind="stable")
        firsts = firsts[promising[: max(FEWEST_LANES, MOST_STATES // len(candidates))]]
    lanes = len(firsts) if ring else 1
    onward = np.where(candidates.owner[:, None] == candidates.owner, np.inf, network.between)
    run = np.full((1 << len(watched), lanes, len(candidates)), np.inf)
    run[bit[firsts], np.arange(lanes) if ring else 0, firsts] = opening[firsts]
    begun = np.zeros(run.shape, dtype=np.int16)
    trace = _Trace([begun], [begun])
    for i, x in enumerate(bounds[1:-1], 1):
        leaving = np.flatnonzero((start < x) & (end >= x))
        entering = np.flatnonzero((start <= x) & (end > x))
        after = np.zeros(run.shape, dtype=np.int16)
        trace.begun.append(begun.copy())
        trace.after.append(after)
        if len(leaving) == 0 or len(entering) == 0:
            continue
        leave = run[:, :, leaving] + price[leaving] * x
        room = max(2, MOST_PAIRS // (run.shape[0] * lanes * len(entering)))
        if len(leaving) > room:
            cheapest = np.argpartition(leave.min(axis=(0, 1)), room)[:room]
            leaving, leave = leaving[cheapest], leave[:, :, cheapest]
        paths = leave[:, :, None, :] + onward[np.ix_(leaving, entering)].T
        nearest = paths.argmin(axis=3)
        enter = np.take_along_axis(paths, nearest[..., None], axis=3)[..., 0]
        enter += candidates.fixed_s[entering] - price[entering] * x
        after[:, :, entering] = leaving[nearest]
        for column in np.flatnonzero(bit[entering]):
            _mark_used(enter[:, :, column], int(bit[entering[column]]))
        before = run[:, :, entering]
        better = enter < before
        run[:, :, entering] = np.where(better, enter, before)
        begun[:, :, entering] = np.where(better, np.int16(i), begun[:, :, entering])
    trace.begun.append(begun)
    total = np.where((start < wanted.end) & (end >= wanted.end), run + price * wanted.end + candidates.last_s, np.inf)
    total += network.back[:, firsts].T if network.back is not None else network.exit
    at = np.unravel_index(int(total.argmin()), total.shape)
    cost = float(total[at])
    return (cost, _legs(trace, bounds, bit, (int(at[0]), int(at[1]), int(at[2])))) if np.isfinite(cost) else None


def _mark_used(enter: Floats, own: int) -> None:
    """Move the costs of entering one watched candidate (by set of used ones, lane) to the sets with it; in place."""
    for used in range(enter.shape[0] - 1, -1, -1):
        enter[used] = enter[used ^ own] if used & own else enter[used]
    for used in range(enter.shape[0]):
        if not used & own:
            enter[used] = np.inf


def _legs(trace: _Trace, bounds: Ints, bit: Ints, at: tuple[int, int, int]) -> list[Leg]:
    used, lane, candidate = at
    legs: list[Leg] = []
    i = len(bounds) - 1
    while i > 0:
        begun = int(trace.begun[i][used, lane, candidate])
        legs.append((candidate, int(bounds[begun]), int(bounds[i])))
        used ^= int(bit[candidate])
        candidate, i = int(trace.after[begun][used, lane, candidate]), begun
    return legs[::-1]
