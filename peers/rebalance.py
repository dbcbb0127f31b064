"""Whether a serving peer should serve other layers. Pure.

- *Closing gaps* comes before everything. Everybody who sees the same announcements computes the same moves and makes
  its own. Those who are not needed where they are go first; only if they are not enough do ranges shift along the model
  (Parallax's turning points; prima.cpp's "drop and solve again").
- *Balance*, as in Petals, only if the swarm as a whole could be much better. Who moves is drawn by lot, with a
  probability that sends about as much throughput to a window as it lacks, so that no herd starts. Two peers can't swap
  for ever: the weakest layer that a move touches must be better off by half of what the mover brings.
- *Never bare.* A mover loads its new range first, and looks once more before it drops the old one (:func:`may_drop`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from peers.placement import Holder, Spare, Strength, fill_gaps, weakest, windows
from swarm.config import PlacementSettings
from swarm.coverage import missing_layers
from swarm.types import Announcement, Capacity, LayerRange, PeerId, PeerState

GRAIN = 3.0
"""Imbalance that is put up with, in peers' worth of throughput at one layer."""
DAMPING = 1.0
"""Of the throughput that a window lacks, so much is sent there by lot at each check."""


def close_gaps(holders: Sequence[Holder], num_layers: int) -> dict[PeerId, LayerRange]:
    """Who has to move where so that no layer is missing; empty if all is well or nothing helps.

    Those who are not needed where they are move first, so no layer becomes bare. Only if they are not enough, and all
    of the model would be covered by it, do the others shift along; and if that does not help either, because peers
    differ in size, all of them get other places.
    """
    if not missing_layers([holder.layers for holder in holders], LayerRange(0, num_layers)):
        return {}
    needed = {one.peer_id for one in _least_cover(holders)}
    spares = [Spare(one.peer_id, one.capacity, 1.0) for one in holders if one.peer_id not in needed]
    places = {one.peer_id: one.layers for one in holders}
    places |= fill_gaps([one.layers for one in holders if one.peer_id in needed], spares, num_layers)
    if missing_layers(places.values(), LayerRange(0, num_layers)):
        filled = [Holder(one.peer_id, places[one.peer_id], one.capacity) for one in holders]
        places |= (
            _shift(filled, num_layers, stay=True)
            or _shift(filled, num_layers, stay=False)
            or _anew(holders, num_layers)
        )
    moves = {one.peer_id: places[one.peer_id] for one in holders if not one.layers.covers(places[one.peer_id])}
    return _widened(moves, holders, num_layers)


def _widened(moves: dict[PeerId, LayerRange], holders: Sequence[Holder], num_layers: int) -> dict[PeerId, LayerRange]:
    """Who has to load layers anyway takes as many as fit, where fewest others are; who is there already stays."""
    counts = [0.0] * num_layers
    for one in holders:
        layers = moves.get(one.peer_id, one.layers)
        for layer in range(layers.start, layers.end):
            counts[layer] += 1
    wide: dict[PeerId, LayerRange] = {}
    for one in sorted(holders, key=lambda one: one.peer_id):
        if (must := moves.get(one.peer_id)) is not None:
            options = [layers for layers in windows(one.capacity, num_layers) if layers.covers(must)]
            wide[one.peer_id] = chosen = weakest(counts, options) or must
            for layer in {*range(chosen.start, chosen.end)} - {*range(must.start, must.end)}:
                counts[layer] += 1
    return wide


def _least_cover(holders: Sequence[Holder]) -> list[Holder]:
    """As few as cover what all of them do, by the usual sweep; the rest could leave, all of them together."""
    order = sorted(holders, key=lambda one: (one.layers, one.peer_id))
    chosen: list[Holder] = []
    reached, index = 0, 0
    while index < len(order):
        best: Holder | None = None
        while index < len(order) and order[index].layers.start <= reached:
            if order[index].layers.end > max(reached, best.layers.end if best else 0):
                best = order[index]
            index += 1
        if best is not None:
            chosen.append(best)
            reached = best.layers.end
        elif index < len(order):
            reached = order[index].layers.start
    return chosen


def _shift(holders: Sequence[Holder], num_layers: int, *, stay: bool) -> dict[PeerId, LayerRange]:
    """From left to right, everyone begins where the one before ends; empty if that does not reach the end.

    ``stay``: those whose range continues what is reached keep it.
    """
    moves: dict[PeerId, LayerRange] = {}
    free: list[Holder] = []
    reached = 0

    def put(holder: Holder) -> None:
        nonlocal reached
        end = holder.capacity.end_from(reached, num_layers)
        if end > reached:
            moves[holder.peer_id] = LayerRange(reached, end)
            reached = end

    for holder in sorted(holders, key=lambda one: (one.layers, one.peer_id)):
        fixed = stay or not holder.capacity.middle
        if reached < num_layers and holder.layers.start <= reached and fixed:
            if holder.layers.end > reached:
                reached = holder.layers.end
            else:
                free.append(holder)
        elif reached < num_layers:
            put(holder)
    for holder in free:
        if reached < num_layers:
            put(holder)
    return moves if reached >= num_layers else {}


def _anew(holders: Sequence[Holder], num_layers: int) -> dict[PeerId, LayerRange]:
    """All places given out again, as to joiners; empty if that does not suffice, or while some load what they have."""
    if not all(one.capacity.middle for one in holders):
        return {}
    moves = fill_gaps([], [Spare(one.peer_id, one.capacity, 1.0) for one in holders], num_layers)
    return {} if missing_layers(moves.values(), LayerRange(0, num_layers)) else moves


@dataclass(frozen=True, slots=True)
class Mover:
    """A serving peer that asks itself whether to move."""

    layers: LayerRange
    capacity: Capacity
    rate: float
    moved_at: float
    """When it last began to load a range."""


def should_move(
    me: Mover, strength: Strength, settings: PlacementSettings, now: float, luck: float
) -> LayerRange | None:
    """Where to move for a better balance, or ``None``; ``luck`` is uniform in [0, 1) and drawn anew for each question.

    Gaps are not the question here but that of :func:`close_gaps`.
    """
    if now - me.moved_at < settings.rebalance_cooldown_s:
        return None
    goal, lowest = strength.balanced, tolerable(strength, settings)
    if min(strength.secured) >= lowest or not may_leave(me.layers, None, strength.servers):
        return None
    without = strength.plus(me.layers, -me.rate)
    target = weakest(without.secured, windows(me.capacity, len(strength.rates)))
    if target is None or target == me.layers:
        return None
    there = strength.secured[target.start : target.end]
    wanted = sum(max(0.0, goal - rate) for rate in there) / sum(strength.rates)
    if min(there) >= lowest or luck >= DAMPING * wanted:
        return None
    touched = {*range(me.layers.start, me.layers.end), *range(target.start, target.end)}
    before = sorted(strength.secured[layer] for layer in touched)
    after = sorted(without.plus(target, me.rate).secured[layer] for layer in touched)
    if before[0] == 0.0:
        return target if after.count(0.0) < before.count(0.0) else None
    return target if after[0] - before[0] >= 0.5 * me.rate / len(target) else None


def tolerable(strength: Strength, settings: PlacementSettings) -> float:
    """While the weakest layer has this, nobody moves. A swarm can't be balanced finer than its peers are."""
    grain = GRAIN * len(strength.servers) / max(1, sum(strength.servers))
    return max(0.0, 1 - settings.rebalance_threshold - grain) * strength.balanced


def may_leave(layers: LayerRange, new: LayerRange | None, servers: Sequence[int]) -> bool:
    """Whether others hold all layers that a peer gives up; ``servers`` counts those who stay, and the peer itself."""
    given_up = (layer for layer in range(layers.start, layers.end) if new is None or not new.start <= layer < new.end)
    return all(servers[layer] >= 2 for layer in given_up)


def may_drop(announcements: Iterable[Announcement], me: PeerId, old: LayerRange, new: LayerRange) -> bool:
    """Asked once more before a mover drops its old range: do others hold what it gives up?

    Of several that leave one layer, those with the smaller peer id go first.
    """
    counts = {layer: 0 for layer in range(old.start, old.end) if not new.start <= layer < new.end}
    for a in announcements:
        if a.state is PeerState.SERVING and a.peer.peer_id != me:
            for layer in counts.keys() & set(range(a.layers.start, a.layers.end)):
                going = a.moving_to is not None and not a.moving_to.start <= layer < a.moving_to.end
                counts[layer] += 0 if going and a.peer.peer_id < me else 1
    return all(counts.values())
