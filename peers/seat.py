"""Taking a range among others that take theirs, and leaving it for another: ``peers.placement`` on the real view.

A joiner says on the DHT that it is there and has not decided, waits for as long as others may need to say the same, and
takes what all of them work out for it. What it loads then is a lease that others respect. A serving peer with
``--layers auto`` looks at the swarm again and again: it asks those who should be there whether they still are (an
announcement outlives its peer), closes a gap that only it should close, and now and then moves for balance.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from peers.memory import MB, Demands, MemoryPlan, capacity_of, least_bytes, plan_memory
from peers.placement import choose_range, rate_of, standing
from peers.rebalance import Mover, close_gaps, may_drop, should_move
from swarm.config import PlacementSettings, Settings
from swarm.coverage import coverage_of, nobody_serves
from swarm.discovery import Announcer, SwarmView
from swarm.errors import Internal, NotAdmitted, SwarmError
from swarm.info import describe
from swarm.models import ModelProfile
from swarm.transport import Transport
from swarm.types import Announcement, Capacity, LayerRange, PeerId, PeerState

logger = logging.getLogger(__name__)

ROUNDS = 3
"""A joiner chooses again if others have taken its layers while a gap is left, at most so often."""
MOST_ASKED = 16
"""Peers that are asked at once whether they are still there."""
LOOK_AGAIN_S = 1.0
"""After a peer did not answer, or a gap was seen."""
TWICE = 2
"""A peer that does not answer so often is gone; a gap that was seen so often is one."""


@dataclass(frozen=True, slots=True)
class Room:
    """What a peer gives, and what fits it."""

    given_bytes: int
    capped: bool
    """By ``max_memory_mb``; else it is what was free."""
    most_kv_bytes: int
    """``kv_budget_mb``, for a peer that is not capped."""
    demands: Demands
    capacity: Capacity

    @classmethod
    def of(cls, settings: Settings, profile: ModelProfile, free_bytes: int, *, on_cpu: bool) -> Room:
        given = settings.peer.max_memory_mb * MB or free_bytes
        demands = Demands(
            kv_tokens=min(settings.placement.kv_tokens, profile.max_positions),
            margin=settings.peer.memory_safety_margin,
            batch_tokens=settings.engine.max_batch_tokens,
            logits_rows=settings.peer.max_cached_sessions,
            checkpoints=settings.peer.checkpoints,
            embedding_in_file=on_cpu,
        )
        capped, most_kv = settings.peer.max_memory_mb > 0, settings.peer.kv_budget_mb * 2**20
        return cls(given, capped, most_kv, demands, capacity_of(given, profile, demands))

    def divide(self, profile: ModelProfile, layers: LayerRange) -> MemoryPlan:
        """Raises :class:`NotAdmitted` if the owner has set a limit and the layers don't fit it."""
        plan = plan_memory(self.given_bytes, profile, layers, self.demands)
        if self.capped and not plan.fits:
            needed = -(-least_bytes(profile, layers, self.demands) // MB)
            raise NotAdmitted(
                f"layers {layers} need {needed} MB with room for {self.demands.kv_tokens} tokens; max_memory_mb is "
                f"{self.given_bytes // MB}, which is enough for {self.capacity.middle} layers in the middle of the "
                f"model, {self.capacity.first} from its first or {self.capacity.last} to its last"
            )
        return plan if self.capped else plan.with_most_kv(self.most_kv_bytes)

    def settings_for(self, settings: Settings, plan: MemoryPlan) -> Settings:
        """With the KV budget that the plan leaves; where no limit was set, that is ``kv_budget_mb`` at most, and just
        that if the plan leaves too little: what is free changes."""
        budget_mb = max(1, plan.kv_bytes // 2**20) if self.capped or plan.fits else settings.peer.kv_budget_mb
        return replace(settings, peer=replace(settings.peer, kv_budget_mb=budget_mb))


class Leases:
    """Since when each peer has been joining, or loading what it loads beside what it serves, by our own clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: dict[PeerId, tuple[LayerRange | None, float]] = {}

    def watch(self, announcements: list[Announcement]) -> None:
        now = self._clock()
        # one that joins gets no new lease for another range: else it could go on like that for ever
        loading = {
            a.peer.peer_id: None if a.state is PeerState.JOINING else a.moving_to
            for a in announcements
            if a.state is PeerState.JOINING or a.moving_to is not None
        }
        self._since = {
            peer: known if (known := self._since.get(peer)) is not None and known[0] == layers else (layers, now)
            for peer, layers in loading.items()
        }

    def age_s(self, peer: PeerId) -> float:
        known = self._since.get(peer)
        return self._clock() - known[1] if known is not None else 0.0


def credible(view: SwarmView) -> list[Announcement]:
    """Those who join, and of the others those whom planners use: the rest serves nothing, whatever it says."""
    return [a for a in view.announcements() if a.state is PeerState.JOINING or view.check(a) is None]


def no_layer_fits(profile: ModelProfile, demands: Demands) -> NotAdmitted:
    """For a peer that can't take any part of the model."""
    needed = -(-least_bytes(profile, LayerRange(1, 2), demands) // MB)
    return NotAdmitted(
        f"not one layer of {profile.name} fits what this peer may take (--max-memory-mb, or what is free): "
        f"one needs {needed} MB"
    )


async def take_seat(
    view: SwarmView,
    announcer: Announcer,
    draft: Announcement,
    profile: ModelProfile,
    demands: Demands,
    settings: PlacementSettings,
) -> LayerRange:
    """The range to serve; it is announced as a lease. ``draft``: our announcement, JOINING.

    Raises :class:`NotAdmitted` if not one layer fits.
    """
    for tries_left in reversed(range(ROUNDS)):
        await announcer.update(replace(draft, moving_to=None))
        await asyncio.sleep(settings.settle_s * random.uniform(1.0, 1.2))
        await view.refresh()
        chosen = choose_range(credible(view), draft, profile.num_layers, settings)
        if chosen is None:
            raise no_layer_fits(profile, demands)
        await announcer.update(replace(draft, layers=chosen, moving_to=chosen))
        await asyncio.sleep(settings.settle_s / 2)
        await view.refresh()
        if not tries_left or not _lost_the_seat(credible(view), draft.peer.peer_id, chosen, profile, settings):
            return chosen
    raise Internal("no range was chosen")


def _lost_the_seat(
    announcements: list[Announcement],
    me: PeerId,
    chosen: LayerRange,
    profile: ModelProfile,
    settings: PlacementSettings,
) -> bool:
    """Others hold all of our layers, and other layers are held by nobody: of equals, the larger peer id goes on."""
    others = [a for a in announcements if a.peer.peer_id != me]
    first = [a for a in others if a.state is PeerState.SERVING or a.peer.peer_id < me]
    mine = range(chosen.start, chosen.end)
    counts = coverage_of(standing(first, profile.num_layers, settings).served, profile).counts
    if not all(counts[layer] for layer in mine):
        return False
    served = standing(others, profile.num_layers, settings).served
    return not coverage_of([*served, chosen], profile).complete


class Watch:
    """A serving peer's question to itself: should I be elsewhere? :meth:`next_move` answers when it is yes."""

    def __init__(
        self,
        transport: Transport,
        view: SwarmView,
        own: Callable[[], Announcement],
        capacity: Capacity,
        profile: ModelProfile,
        settings: Settings,
    ) -> None:
        self._transport = transport
        self._view = view
        self._own = own
        self._capacity = capacity
        self._profile = profile
        self._settings = settings
        self._leases = Leases()
        self._silent: dict[PeerId, int] = {}
        self._moved_at = time.monotonic()
        self._random = random.Random()

    async def next_move(self) -> tuple[LayerRange, str, bool]:
        """The range to go to, why, as a sentence for the owner, and whether it is because layers are missing."""
        placement = self._settings.placement
        period_s = min(placement.check_period_s, self._settings.discovery.view_period_s) / 2
        gap_moves: list[LayerRange | None] = []
        next_balance = time.monotonic() + placement.check_period_s * self._random.uniform(1, 2)
        while True:
            silent = any(0 < missed < TWICE for missed in self._silent.values())
            doubtful = silent or (len(gap_moves) > 0 and gap_moves[-1] is not None)
            await asyncio.sleep((LOOK_AGAIN_S if doubtful else period_s) * self._random.uniform(0.9, 1.1))
            seen = await self._present()
            gap_moves = [*gap_moves, self._gap_move(seen)][-TWICE:]
            if len(gap_moves) == TWICE and gap_moves[0] is not None and gap_moves[0] == gap_moves[1]:
                serving = [a.layers for a in seen if a.state is PeerState.SERVING]
                gaps = coverage_of(serving, self._profile).missing
                reason = nobody_serves(gaps) if gaps else "the layers there hang on one peer"
                return gap_moves[0], reason, bool(gaps)
            if time.monotonic() >= next_balance:
                next_balance = time.monotonic() + placement.check_period_s
                target = self._balance_move(seen)
                if target is not None:
                    return target, "the layers there are the weakest of the swarm", False

    def _gap_move(self, seen: list[Announcement]) -> LayerRange | None:
        now = standing(seen, self._profile.num_layers, self._settings.placement, self._leases.age_s)
        if now.undecided:
            return None  # it may be for them
        return close_gaps(now.holders, self._profile.num_layers).get(self._own().peer.peer_id)

    def _balance_move(self, seen: list[Announcement]) -> LayerRange | None:
        own, num_layers, placement = self._own(), self._profile.num_layers, self._settings.placement
        now = standing(seen, num_layers, placement, self._leases.age_s)
        if not all(now.strength.servers) or now.undecided:
            return None
        me = Mover(own.layers, self._capacity, rate_of(own), self._moved_at)
        target = should_move(me, now.strength, placement, time.monotonic(), self._random.random())
        if target is None or not may_drop(seen, own.peer.peer_id, own.layers, target):
            return None
        return target

    async def _present(self) -> list[Announcement]:
        """The view without those who don't answer, and with what we say of ourselves now."""
        await self._view.refresh()
        own = self._own()
        others = [a for a in credible(self._view) if a.peer.peer_id != own.peer.peer_id]
        late_s = self._settings.discovery.announce_period_s + self._settings.discovery.view_period_s
        doubtful = (
            others if len(others) <= MOST_ASKED else [a for a in others if self._view.age(a.peer.peer_id) > late_s]
        )
        asked = doubtful[:MOST_ASKED]
        answers = await asyncio.gather(*(self._answers(a) for a in asked))
        there = {a.peer.peer_id for a in others}
        self._silent = {peer: missed for peer, missed in self._silent.items() if peer in there}
        for a, answered in zip(asked, answers, strict=True):
            missed = 0 if answered else self._silent.get(a.peer.peer_id, 0) + 1
            self._silent[a.peer.peer_id] = missed
            if missed >= TWICE:
                logger.info("peer %s announces itself but does not answer", a.peer.peer_id[-6:])
                self._view.forget(a.peer.peer_id)
        present = [*(a for a in others if self._silent.get(a.peer.peer_id, 0) < TWICE), own]
        self._leases.watch(present)
        return present

    async def _answers(self, announcement: Announcement) -> bool:
        if announcement.state is PeerState.JOINING:
            return True  # it serves nothing yet, not even answers
        try:
            async with asyncio.timeout(self._settings.timeouts.connect_s):
                await describe(self._transport, announcement.peer, self._settings)
        except (SwarmError, TimeoutError):
            return False
        return True
