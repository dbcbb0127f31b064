"""Which layers a peer serves: chosen when it joins, reconsidered while it serves. Pure.

- *The weakest window.* A joiner takes the range whose layers have least throughput, compared as sorted lists, so that
  the weakest layer counts first (Petals' block selection). A peer's throughput is that of one token through all of its
  layers, ``1 / (seconds per layer x layers)``, and never depends on a count per peer.
- *Gaps first.* While layers are missing, those who are free fill the gaps from left to right, the best fitting first;
  who is last in the model keeps room for the head. A layer that hangs on one peer comes next.
- *Leases.* What a peer is loading counts as served, less as time goes by. Joiners that have not decided are placed
  together: everybody who sees the same announcements computes the same places for all of them, and takes its own.
  Moving later is :mod:`peers.rebalance`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from swarm.config import PlacementSettings
from swarm.coverage import missing_layers
from swarm.types import Announcement, Capacity, LayerRange, PeerId, PeerState

MOST_CREDIT = 8.0
"""A peer's announced speed counts for no more than this many times the median: a lie must not empty a window."""
MOST_SETTLING = 20.0
"""Who joins and has not decided after so many times ``settle_s`` is not waited for: that suffices for all rounds of
``peers.seat``."""

ENOUGH_FOR_TWO = 2.2
"""Peers for each layer, on average, from which on no layer should have but one: then no single crash opens a gap."""


@dataclass(frozen=True, slots=True)
class Spare:
    """A peer that may be placed anywhere."""

    peer_id: PeerId
    capacity: Capacity
    rate: float
    """Layers a second for one token: 1 / ``decode_s_per_layer``."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A peer that serves ``layers`` and could serve others."""

    peer_id: PeerId
    layers: LayerRange
    capacity: Capacity


@dataclass(frozen=True, slots=True)
class Strength:
    """What the swarm has at each layer."""

    rates: tuple[float, ...]
    """Tokens a second through each layer."""
    servers: tuple[int, ...]

    @property
    def secured(self) -> tuple[float, ...]:
        """The same, but nothing for a layer that hangs on one peer, if there are enough peers for two everywhere."""
        if sum(self.servers) < ENOUGH_FOR_TWO * len(self.servers):
            return self.rates
        return tuple(rate if count >= 2 else 0.0 for rate, count in zip(self.rates, self.servers, strict=True))

    @property
    def balanced(self) -> float:
        """What the same peers could do at most: their layers a second spread evenly (water-filling)."""
        return sum(self.rates) / len(self.rates)

    def plus(self, layers: LayerRange, rate: float) -> Strength:
        """With (or for a negative rate without) one more peer on ``layers``."""
        change = rate / len(layers)
        count = 1 if rate >= 0 else -1
        rates, servers = list(self.rates), list(self.servers)
        for layer in range(layers.start, layers.end):
            rates[layer] = max(0.0, rates[layer] + change)
            servers[layer] += count
        return Strength(tuple(rates), tuple(servers))


# --- choosing -------------------------------------------------------------------------------------------------------


def windows(capacity: Capacity, num_layers: int) -> list[LayerRange]:
    """The longest ranges that fit, none within another."""
    found: list[LayerRange] = []
    reached = 0
    for start in range(num_layers):
        end = capacity.end_from(start, num_layers)
        if end > max(start, reached):
            found.append(LayerRange(start, end))
            reached = end
    return found


def weakest(rates: Sequence[float], options: Iterable[LayerRange]) -> LayerRange | None:
    """The option whose layers have least throughput; the shorter of two that agree is weaker."""
    return min(options, key=lambda layers: (sorted(rates[layers.start : layers.end]), layers), default=None)


def fill_gaps(served: Iterable[LayerRange], spares: Sequence[Spare], num_layers: int) -> dict[PeerId, LayerRange]:
    """Ranges for as many of ``spares`` as the missing layers need; the same for everyone who asks with the same facts.

    The end of the model first, where the head takes room (not by the only one that has room for the embedding, where
    that is needed); then from left to right, by the smallest peer that fills what is left of a gap, or else by the one
    that gets furthest.
    """
    held = list(served)
    free = sorted(spares, key=lambda spare: spare.peer_id)
    placed: dict[PeerId, LayerRange] = {}

    def take(spare: Spare, layers: LayerRange) -> None:
        free.remove(spare)
        held.append(layers)
        placed[spare.peer_id] = layers

    gaps = missing_layers(held, LayerRange(0, num_layers))
    if gaps and gaps[-1].end == num_layers and not any(_fills(spare, gaps[-1], num_layers) for spare in free):
        embedding = [one for one in free if one.capacity.first] if gaps[0].start == 0 else []
        others = free if len(embedding) != 1 else [one for one in free if one not in embedding]
        spare = max(others, key=lambda one: one.capacity.last, default=None)
        if spare is not None and spare.capacity.last:
            take(spare, LayerRange(max(gaps[-1].start, num_layers - spare.capacity.last), num_layers))
    at = 0
    while free and at < num_layers and (gaps := missing_layers(held, LayerRange(at, num_layers))):
        at, gap = gaps[0].start, gaps[0]
        filling = [spare for spare in free if _fills(spare, gap, num_layers)]
        furthest = max(free, key=lambda one: one.capacity.end_from(at, num_layers))
        spare = min(filling, key=lambda one: (one.capacity.middle, one.rate)) if filling else furthest
        end = min(gap.end, spare.capacity.end_from(at, num_layers))
        if end > at:
            take(spare, LayerRange(at, end))
        else:
            at += 1  # nobody fits here, but perhaps further right
    return placed


def _fills(spare: Spare, gap: LayerRange, num_layers: int) -> bool:
    return spare.capacity.end_from(gap.start, num_layers) >= gap.end


def arrange(
    strength: Strength, served: Sequence[LayerRange], spares: Sequence[Spare]
) -> tuple[dict[PeerId, LayerRange], Strength]:
    """Places for all of ``spares``, decided together: gaps, then the weakest windows; and what the swarm has then."""
    num_layers = len(strength.rates)
    needed = fill_gaps(served, spares, num_layers)
    for spare in spares:
        if spare.peer_id in needed:
            strength = strength.plus(needed[spare.peer_id], spare.rate)
    placed: dict[PeerId, LayerRange] = {}
    # those who are needed in a gap may serve more than it; they choose first, then the others
    for spare in sorted(spares, key=lambda one: (one.peer_id not in needed, one.peer_id)):
        must = needed.get(spare.peer_id)
        options = windows(spare.capacity, num_layers)
        if must is not None:
            strength = strength.plus(must, -spare.rate)
            options = [layers for layers in options if layers.covers(must)] or [must]
        chosen = weakest(strength.secured, options)
        if chosen is not None:
            placed[spare.peer_id] = chosen
            strength = strength.plus(chosen, spare.rate)
    return placed, strength


# --- from announcements ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Standing:
    """What a peer reads of a swarm view to place itself."""

    strength: Strength
    """Of those who serve, and of leases by their age; without the undecided."""
    served: tuple[LayerRange, ...]
    """Ranges that are served or being loaded."""
    holders: tuple[Holder, ...]
    """Who serves and could be asked to move; one that is moving stands where it goes, and stays there."""
    undecided: tuple[Spare, ...]


def standing(
    announcements: Iterable[Announcement],
    num_layers: int,
    settings: PlacementSettings,
    lease_age_s: Callable[[PeerId], float] = lambda peer: 0.0,
) -> Standing:
    """``lease_age_s``: how long ago a peer was first seen joining, or with its present lease."""
    here = (PeerState.SERVING, PeerState.JOINING)
    known = [a for a in announcements if a.state in here or (a.state is PeerState.DRAINING and a.moving_to is not None)]
    median = statistics.median([rate_of(a) for a in known]) if known else 0.0
    strength = Strength((0.0,) * num_layers, (0,) * num_layers)
    served: list[LayerRange] = []
    holders: list[Holder] = []
    undecided: list[Spare] = []
    for a in known:
        peer, rate = a.peer.peer_id, min(rate_of(a), MOST_CREDIT * median)
        capacity = a.capacity or Capacity(len(a.layers), len(a.layers), len(a.layers))
        if a.state is PeerState.JOINING and a.moving_to is None:
            if lease_age_s(peer) <= MOST_SETTLING * settings.settle_s:
                undecided.append(Spare(peer, capacity, rate))
            continue
        target = a.moving_to or a.layers
        weight = 1.0 if a.moving_to is None else 0.5 ** (lease_age_s(peer) / settings.lease_s)
        strength = strength.plus(target, rate * weight)
        if weight >= 0.25:  # later, a lease is no promise any more
            served.append(target)
            holders.append(Holder(peer, target, capacity if a.moving_to is None else Capacity(0, 0, 0)))
        if a.state is PeerState.SERVING and a.moving_to is not None:
            served.append(a.layers)
    return Standing(strength, tuple(served), tuple(holders), tuple(undecided))


def rate_of(announcement: Announcement) -> float:
    return 1.0 / max(announcement.decode_s_per_layer, 1e-7)


def choose_range(
    announcements: Iterable[Announcement],
    me: Announcement,
    num_layers: int,
    settings: PlacementSettings,
) -> LayerRange | None:
    """The range for a joiner, as everyone who sees the same joiners computes it; ``None``: not one layer fits.

    ``me``: its own announcement, JOINING, with its capacity and a guess of its speed, and no ``moving_to``.
    """
    others = [a for a in announcements if a.peer.peer_id != me.peer.peer_id]
    seen = standing([*others, me], num_layers, settings)
    return arrange(seen.strength, seen.served, seen.undecided)[0].get(me.peer.peer_id)
