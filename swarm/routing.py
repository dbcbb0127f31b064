"""Planning a route: the fastest way through all layers, by what is known now. Pure; the same for clients and peers.

A route costs, for each token: what its links take (the last peer sends the token to the first: S hops have S links,
one peer alone has none), what each hop takes to receive, queue and send, and each peer's time per layer multiplied by
the layers that are used. A prompt adds its prefill, shared out among the tokens that are expected. A hop may enter and
leave a peer's range early. So a route is refused for being slow like any other: one peer, or a shorter chain, wins
whenever it is faster, and :attr:`Plan.left_out` tells everyone else why.

Petals chooses by a graph of spans with one time per server whatever the span; here time is per layer. The search itself
is :mod:`swarm.shortest_path`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from swarm.coverage import missing_layers
from swarm.planning import Field
from swarm.plans import Demand, Knowledge, Plan, PlannedHop
from swarm.types import Announcement, Hop, LayerRange, PeerId, PeerState, Route

__all__ = [
    "Demand",
    "Knowledge",
    "Plan",
    "PlannedHop",
    "merge_hops",
    "missing_layers",
    "plan",
    "plan_route",
    "price",
]


def plan(
    announcements: Sequence[Announcement],
    wanted: LayerRange,
    demand: Demand | None = None,
    knowledge: Knowledge | None = None,
    *,
    ring: bool = True,
    excluded: frozenset[PeerId] = frozenset(),
    runners_up: int = 0,
) -> Plan:
    """The best hops over ``wanted``; raises :class:`NoRoute`, which names the layers that nobody serves, or
    :class:`NoRoom`.

    ``ring``: the last hop sends to the first, as on a whole route; without it, the hops lie between
    ``knowledge.before`` and ``knowledge.after``. Exact for small swarms, within a few percent for large ones.
    """
    question = Field(announcements, wanted, demand or Demand(), knowledge or Knowledge(), ring, excluded)
    best = question.solve()
    if best is None:
        raise question.refusal()
    others: list[Plan] = []
    if runners_up:
        for planned in best.hops:
            other = question.solve(without=planned.hop.peer.peer_id)
            if other is not None and all(_peers(other) != _peers(known) for known in others):
                others.append(other)
        others.sort(key=lambda one: one.cost_s)
    return replace(best, left_out=question.left_out(best), runners_up=tuple(others[:runners_up]))


def _peers(planned: Plan) -> list[Hop]:
    return [one.hop for one in planned.hops]


def merge_hops(hops: Iterable[Hop]) -> tuple[Hop, ...]:
    """Neighbouring hops of one peer are one hop."""
    merged: list[Hop] = []
    for hop in hops:
        if merged and merged[-1].peer.peer_id == hop.peer.peer_id:
            merged[-1] = Hop(hop.peer, LayerRange(merged[-1].layers.start, hop.layers.end))
        else:
            merged.append(hop)
    return tuple(merged)


def plan_route(
    announcements: Sequence[Announcement],
    num_layers: int,
    *,
    tokens: int = 0,
    excluded: frozenset[PeerId] = frozenset(),
    knowledge: Knowledge | None = None,
) -> Route:
    """The cheapest route for a session of ``tokens`` tokens."""
    return plan(announcements, LayerRange(0, num_layers), Demand(tokens=tokens), knowledge, excluded=excluded).route


def price(
    announcements: Sequence[Announcement],
    route: Route,
    demand: Demand | None = None,
    knowledge: Knowledge | None = None,
) -> Plan:
    """What just this route is expected to take; raises :class:`NoRoute` if a peer of it is no longer announced."""
    layers = {hop.peer.peer_id: hop.layers for hop in route.hops}
    held = [
        replace(a, layers=layers[a.peer.peer_id], state=PeerState.SERVING, head_s=_head_s(a, layers[a.peer.peer_id]))
        for a in announcements
        if a.peer.peer_id in layers and a.layers.covers(layers[a.peer.peer_id])
    ]
    knowledge = replace(knowledge or Knowledge(), check=lambda announcement: None, seed=None)
    return plan(held, LayerRange(0, route.hops[-1].layers.end), replace(demand or Demand(), tokens=0), knowledge)


def _head_s(a: Announcement, layers: LayerRange) -> float:
    return a.head_s if layers.end == a.layers.end else 0.0
