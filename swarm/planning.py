"""One question to the planner: its candidates with their costs a token, the search, and the answer in words."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from swarm.coverage import listed, missing_layers, nobody_serves
from swarm.errors import NoRoom, NoRoute
from swarm.paces import as_measured
from swarm.plans import Demand, Knowledge, Plan, PlannedHop
from swarm.shortest_path import Candidates, Floats, Ints, Leg, Network, choose, search, through
from swarm.types import Announcement, Hop, LayerRange, PeerId, PeerState

QUEUE_HALF_LIFE_S = 15.0
"""An announced queue of this age counts half: queues change faster than announcements."""

MOST_CANDIDATES = 96
"""Of a large swarm, so many peers are searched with their real link times: the best by estimated ones."""
PER_RANGE = 6
"""... and no more of one range."""
FEWEST_PARTS = 4
"""Of a peer whose KV room isn't enough for all its layers, so many parts are candidates in a large swarm."""
MOST_NAMED = 64
"""Peers that a plan names as left out for being slower; those that were refused are all named."""


class Field:
    """The candidates for one question, with their costs a token."""

    def __init__(
        self,
        announcements: Sequence[Announcement],
        wanted: LayerRange,
        demand: Demand,
        knowledge: Knowledge,
        ring: bool,
        excluded: frozenset[PeerId],
    ) -> None:
        self.wanted, self.demand, self.knowledge, self.ring = wanted, demand, knowledge, ring
        self.refused: dict[PeerId, str] = {}
        self.usable: list[Announcement] = []
        self.queues: Floats = np.zeros(0)
        self.penalties: Floats = np.zeros(0)
        self._given = announcements
        self._scores: Floats = np.zeros(0)
        self._kept: Candidates | None = None
        self._full: list[Announcement] = []
        """Those without KV room for a single layer."""
        self._rooms: Ints = np.zeros(0, dtype=np.int64)
        """Layers for which each usable peer has KV room."""
        self._admit(excluded)
        if self.usable:
            self._prepare(self._parts())

    def _admit(self, excluded: frozenset[PeerId]) -> None:
        """Who may be on a route. Of a large swarm this loop is much of a plan: only what needs each peer is here."""
        check, first, end = self.knowledge.check, self.wanted.start, self.wanted.end
        for a in self._given:
            held = a.layers
            if held.end <= first or held.start >= end:
                continue
            if a.state is not PeerState.SERVING:
                self.refused[a.peer.peer_id] = f"it is {a.state}"
            elif excluded and a.peer.peer_id in excluded:
                self.refused[a.peer.peer_id] = "it can't be reached, or is leaving"
            elif (reason := check(a)) is not None:
                self.refused[a.peer.peer_id] = reason
            else:
                self.usable.append(a)
        free = np.array([a.kv_tokens_free for a in self.usable], dtype=np.int64)
        rooms = usable_layers(np.array([len(a.layers) for a in self.usable], dtype=np.int64), free, self.demand)
        self._full = [self.usable[index] for index in np.flatnonzero(rooms < 1)]
        for a in self._full:
            self.refused[a.peer.peer_id] = (
                f"no KV room: {a.kv_tokens_free} tokens are free, {self.demand.tokens} are needed"
            )
        paces = self.knowledge.paces
        self.usable = [
            as_measured(a, paces.get(a.peer.peer_id)) if paces else a
            for a, room in zip(self.usable, rooms.tolist(), strict=True)
            if room >= 1
        ]
        self._rooms = rooms[rooms >= 1]

    def _parts(self) -> tuple[Ints, Ints, Ints]:
        """Index of the peer, first layer and end of each candidate.

        A candidate is the whole range of a peer where there is KV room for it, else one of its parts of as many layers
        as there is room for: all of them, or where those are too many, some with the first and the last.
        """
        start = np.maximum([a.layers.start for a in self.usable], self.wanted.start)
        end = np.minimum([a.layers.end for a in self.usable], self.wanted.end)
        room = np.minimum(self._rooms, end - start)
        spare = end - start - room
        step = np.ones_like(spare)
        if int(spare.sum()) + len(spare) > MOST_CANDIDATES:
            most = max(FEWEST_PARTS, MOST_CANDIDATES // len(spare))
            step = np.maximum(1, -(-spare // (most - 1)))
        shift = np.arange(len(spare)) % step  # other parts of each peer, so that together they are anywhere
        count = -(-(spare + shift) // step) + 1
        owner = np.repeat(np.arange(len(spare)), count)
        nth = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
        first = start[owner] + np.clip(nth * step[owner] - shift[owner], 0, spare[owner])
        return owner, first, first + room[owner]

    def _prepare(self, parts: tuple[Ints, Ints, Ints]) -> None:
        """Costs for each candidate, and the choice of those that are searched."""
        usable, demand, knowledge = self.usable, self.demand, self.knowledge
        owner, start, end = parts
        peers = [a.peer.peer_id for a in usable]
        decode = np.array([a.decode_s_per_layer for a in usable])
        if demand.prompt_tokens:
            prefill = np.array([a.prefill_s_per_token_layer for a in usable])
            decode = decode + prefill * demand.prompt_tokens / demand.new_tokens
        self.queues = np.array([a.queue_s for a in usable])
        for index in np.flatnonzero(self.queues):
            self.queues[index] *= 0.5 ** (knowledge.age_s(peers[index]) / QUEUE_HALF_LIFE_S)
        fixed = self.queues + np.array([a.step_s for a in usable]) + knowledge.hop_s + knowledge.hop_margin_s
        end_of_all = self.wanted.end
        last = np.array([a.head_s if a.layers.end == end_of_all else 0.0 for a in usable])
        if knowledge.seed is not None:
            luck = 1 + knowledge.spread * np.random.default_rng(knowledge.seed).random(len(usable))
            decode, fixed, last = decode * luck, fixed * luck, last * luck
        self.penalties = np.array([knowledge.penalties.get(peer, 0.0) for peer in peers])
        fixed = fixed + self.penalties
        candidates = Candidates(owner, start, end, fixed[owner], decode[owner], last[owner])
        estimated = 2 * knowledge.links.heights_s(peers)  # into the peer and out of it, where the other ends are usual
        estimated = estimated + self._bytes_a_token() / knowledge.links.default_bytes_per_s
        scores, route = through(candidates, estimated[owner], self.wanted)
        if self.ring:
            scores -= self._bytes_a_token() / knowledge.links.default_bytes_per_s  # no part of the prompt goes back
        whole = (start <= self.wanted.start) & (end >= self.wanted.end)
        alone = candidates.fixed_s + candidates.layer_s * len(self.wanted) + candidates.last_s
        scores = np.where(whole & self.ring, np.minimum(scores, alone), scores)
        self._scores = np.full(len(usable), np.inf)
        np.minimum.at(self._scores, owner, scores)
        if len(candidates) > MOST_CANDIDATES:
            kept = choose(candidates, scores, route, MOST_CANDIDATES, PER_RANGE)
            candidates = candidates.take(self._with_near_ones(candidates, kept))
        self._kept = candidates

    def _bytes_a_token(self) -> float:
        """What a link carries of the prompt, for each new token."""
        return self.demand.prompt_tokens * self.demand.activation_bytes / self.demand.new_tokens

    def _with_near_ones(self, candidates: Candidates, kept: Ints) -> Ints:
        """``kept`` and those to which one of them has a link much better than estimated."""
        links = self.knowledge.links
        near: set[PeerId] = set()
        for index in np.unique(candidates.owner[kept]):
            peer = self.usable[index].peer.peer_id
            for other in links.measured_from(peer):
                if links.seconds(peer, other) < 0.5 * links.usual_s(other):
                    near.add(other)
        if not near:
            return kept
        owners = {a.peer.peer_id: index for index, a in enumerate(self.usable) if a.peer.peer_id in near}
        found = np.flatnonzero(np.isin(candidates.owner, list(owners.values())))
        best = found[np.argsort(self._scores[candidates.owner[found]], kind="stable")[: MOST_CANDIDATES // 2]]
        return np.unique(np.concatenate([kept, best]))

    def solve(self, without: PeerId | None = None) -> Plan | None:
        candidates = self._kept
        if candidates is None:
            return None
        if without is not None:
            others = [index for index, a in enumerate(self.usable) if a.peer.peer_id != without]
            candidates = candidates.take(np.flatnonzero(np.isin(candidates.owner, others)))
        if len(candidates) == 0:
            return None
        found = search(candidates, self._network(candidates), self.wanted)
        return None if found is None else self._plan(candidates, found[1])

    def _network(self, candidates: Candidates) -> Network:
        owners, where = np.unique(candidates.owner, return_inverse=True)
        peers = [self.usable[index].peer.peer_id for index in owners]
        links, nbytes = self.knowledge.links, self._bytes_a_token()
        heights = links.heights_s(peers)
        ways = heights[:, None] + heights
        prompts = np.full_like(ways, nbytes / links.default_bytes_per_s)
        at = {peer: index for index, peer in enumerate(peers)}
        for index, peer in enumerate(peers):
            for other in links.measured_from(peer):
                if other in at:
                    ways[index, at[other]] = self._way_cost(peer, other)
                    prompts[index, at[other]] = nbytes / links.bytes_per_s(peer, other)
        np.fill_diagonal(ways, 0.0)
        np.fill_diagonal(prompts, 0.0)
        before, after = self.knowledge.before, self.knowledge.after
        entry = np.array([self._link_cost(before, peer) if before else 0.0 for peer in peers])
        exit_ = np.array([self._link_cost(peer, after) if after else 0.0 for peer in peers])
        pairs = np.ix_(where, where)
        return Network((ways + prompts)[pairs], ways[pairs] if self.ring else None, entry[where], exit_[where])

    def _way_cost(self, source: PeerId, target: PeerId) -> float:
        """Of one token."""
        return self.knowledge.links.seconds(source, target) + self.knowledge.links.risk_s(source, target)

    def _link_cost(self, source: PeerId, target: PeerId) -> float:
        """... with its share of the prompt's hidden states."""
        if source == target:
            return 0.0
        return self._way_cost(source, target) + self._bytes_a_token() / self.knowledge.links.bytes_per_s(source, target)

    def _plan(self, candidates: Candidates, legs: list[Leg]) -> Plan:
        """The same costs without the luck that spreads the load."""
        links, demand = self.knowledge.links, self.demand
        chosen = [(int(candidates.owner[index]), LayerRange(start, end)) for index, start, end in legs]
        hops: list[PlannedHop] = []
        cost_s = 0.0
        previous = self.usable[chosen[-1][0]].peer.peer_id if self.ring else self.knowledge.before
        for index, layers in chosen:
            a = self.usable[index]
            peer = a.peer.peer_id
            prefill_s = a.prefill_s_per_token_layer * len(layers) * demand.prompt_tokens
            planned = PlannedHop(
                hop=Hop(a.peer, layers),
                link_s=links.seconds(previous, peer) if previous else 0.0,
                overhead_s=self.knowledge.hop_s,
                queue_s=float(self.queues[index]),
                compute_s=a.token_s(layers),
                prefill_s=prefill_s,
            )
            cost_s += planned.decode_s + self.knowledge.hop_margin_s + float(self.penalties[index])
            cost_s += prefill_s / demand.new_tokens
            if previous:
                closing = self.ring and not hops
                way_s = self._way_cost(previous, peer) if closing else self._link_cost(previous, peer)
                cost_s += way_s - planned.link_s
            hops.append(planned)
            previous = peer
        decode_s = sum(planned.decode_s for planned in hops)
        if not self.ring and previous and self.knowledge.after:
            cost_s += self._link_cost(previous, self.knowledge.after)
            decode_s += links.seconds(previous, self.knowledge.after)
        return Plan(tuple(hops), cost_s, decode_s, self._prefill_s(hops, decode_s))

    def _prefill_s(self, hops: list[PlannedHop], decode_s: float) -> float:
        """A pipeline of chunks: the first one through all stages, the rest behind the slowest stage or link."""
        tokens, links = self.demand.prompt_tokens, self.knowledge.links
        if tokens == 0:
            return decode_s
        share = min(1.0, self.demand.chunk_tokens / tokens)
        peers = [planned.hop.peer.peer_id for planned in hops]
        ways = [tokens * self.demand.activation_bytes / links.bytes_per_s(a, b) for a, b in itertools.pairwise(peers)]
        works = [planned.prefill_s for planned in hops]
        through_s = sum(works) + sum(ways)
        fixed_s = sum(planned.link_s + planned.overhead_s + planned.queue_s for planned in hops)
        return fixed_s + share * through_s + (1 - share) * max(works + ways)

    def left_out(self, best: Plan) -> tuple[tuple[PeerId, str], ...]:
        used = {planned.hop.peer.peer_id for planned in best.hops}
        named = [(peer, reason) for peer, reason in self.refused.items() if peer not in used]
        order = np.argsort(self._scores, kind="stable")[: MOST_NAMED + len(used)]
        slower = [index for index in order if self.usable[index].peer.peer_id not in used][:MOST_NAMED]
        named += [(self.usable[index].peer.peer_id, self._reason(int(index), best)) for index in slower]
        return tuple(named)

    def _reason(self, index: int, best: Plan) -> str:
        if self.penalties[index] > 0:
            return f"it failed recently, which counts {self.penalties[index]:.0f} s a token"
        at_best_s = float(self._scores[index])
        if not np.isfinite(at_best_s):
            return "no route with room leads through it"
        if at_best_s <= best.cost_s * (1 + self.knowledge.spread):
            return "no faster: the chosen route is as good"
        counted = ", with a share of the prompt" if self.demand.prompt_tokens else ""
        return f"slower: at best {at_best_s * 1e3:.1f} ms a token through it, {best.cost_s * 1e3:.1f} without{counted}"

    def refusal(self) -> NoRoute:
        held, needed = [a.layers for a in self.usable], f"room for {self.demand.tokens} tokens"
        gaps = missing_layers(held, self.wanted)
        if not gaps:
            return NoRoom(f"no peers with {needed} form a route over layers {self.wanted}")
        short_of_room = not missing_layers([*held, *(a.layers for a in self._full)], self.wanted)
        text = f"nobody has {needed} in layers {listed(gaps)}" if short_of_room else nobody_serves(gaps)
        reasons = {
            f"{a.peer.peer_id[-6:]} [{a.layers}]: {self.refused[a.peer.peer_id]}"
            for a in self._given
            if a.peer.peer_id in self.refused
            and any(a.layers.start < gap.end and gap.start < a.layers.end for gap in gaps)
        }
        if short_of_room:
            return NoRoom(f"{text}: {'; '.join(sorted(reasons)[:4])}")
        return NoRoute(f"{text}, except {'; '.join(sorted(reasons)[:4])}" if reasons else text)


def usable_layers(held: Ints | int, free: Ints | int, demand: Demand) -> Ints:
    """How many of ``held`` layers the session may use: ``free`` counts tokens over all of them."""
    if demand.tokens <= 0:
        return np.asarray(held)
    room = free * (held + demand.log_layers) / demand.tokens - demand.log_layers
    return np.where(np.asarray(free) >= demand.tokens, held, np.clip(room, 0, held).astype(np.int64))
