"""A serving peer that looks for layers that are missing, among strangers that say what they like."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest

from peers.seat import Leases, Watch, credible
from swarm.admission import check_announcement, vouch
from swarm.announcement_record import encode_announcement
from swarm.config import DiscoverySettings, PlacementSettings, PolicySettings, Settings
from swarm.dht_time import dht_time
from swarm.discovery import SwarmView
from swarm.identity import Identity
from swarm.types import Announcement, Capacity, LayerRange, PeerAddress, PeerState
from tests.sim.world import PROFILE

MODEL = replace(PROFILE, num_layers=30)
EVERYTHING = Capacity(30, 30, 30, whole=True)
SETTINGS = replace(
    Settings(),
    discovery=DiscoverySettings(view_period_s=0.02),
    placement=PlacementSettings(check_period_s=0.02, settle_s=0.005, lease_s=0.05),
)
ME, STRANGER = Identity.ephemeral(), Identity.ephemeral()


def announcement(identity: Identity, layers: str, state: PeerState, moving_to: str = "") -> Announcement:
    return Announcement(
        peer=PeerAddress(identity.peer_id),
        model=MODEL.model_id,
        layers=LayerRange.parse(layers),
        state=state,
        version="0",
        decode_s_per_layer=0.01,
        prefill_s_per_token_layer=0.001,
        kv_tokens_free=1000,
        capacity=EVERYTHING,
        moving_to=LayerRange.parse(moving_to) if moving_to else None,
    )


@dataclass
class Loud:
    """A DHT on which a stranger says the next thing whenever somebody reads."""

    says: itertools.cycle[Announcement]
    sent_at: float = field(default_factory=dht_time)

    async def store(self, key: str, subkey: str, value: bytes, ttl_s: float) -> bool:
        return True

    async def get_many(self, keys: Collection[str]) -> dict[str, dict[str, tuple[bytes, float]]]:
        self.sent_at += 0.001
        record = encode_announcement(replace(next(self.says), sent_at=self.sent_at), STRANGER)
        return {next(iter(keys)): {STRANGER.peer_id: (record, self.sent_at + 45.0)}}


def view_of(*says: Announcement) -> SwarmView:
    check = functools.partial(check_announcement, PolicySettings())
    return SwarmView(Loud(itertools.cycle(says)), MODEL.model_id, 30, SETTINGS.discovery, check=check)


JOINING = announcement(STRANGER, "0:1", PeerState.JOINING)
LOADING = announcement(STRANGER, "0:1", PeerState.JOINING, "8:30")
LOADING_MORE = announcement(STRANGER, "0:1", PeerState.JOINING, "7:30")
SERVING = announcement(STRANGER, "8:30", PeerState.SERVING)


@pytest.mark.parametrize("says", [(JOINING,), (JOINING, LOADING), (LOADING, LOADING_MORE), (SERVING,)])
async def test_a_stranger_that_only_announces_itself_does_not_keep_a_gap_open(
    says: tuple[Announcement, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peers.seat.LOOK_AGAIN_S", 0.01)
    own = replace(
        announcement(ME, "0:8", PeerState.SERVING),
        voucher=vouch(ME, ME.peer_id, MODEL.model_id, LayerRange(0, 8)),
    )
    nobody_is_asked = cast(Any, None)
    watch = Watch(nobody_is_asked, view_of(*says), lambda: own, EVERYTHING, MODEL, SETTINGS)
    moved = None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(3.0):
            moved = await watch.next_move()
    assert moved is not None
    target, _, urgent = moved
    assert (target, urgent) == (LayerRange(0, 30), True)


async def test_who_serves_without_a_voucher_is_nobody_to_reckon_with() -> None:
    vouched = replace(SERVING, voucher=vouch(ME, STRANGER.peer_id, MODEL.model_id, SERVING.layers))
    for said, counts in ((SERVING, False), (vouched, True), (JOINING, True)):
        view = view_of(said)
        await view.refresh()
        assert [a.state for a in credible(view)] == ([said.state] if counts else [])


def test_a_joiner_has_one_lease_and_who_serves_one_for_each_range() -> None:
    now = 0.0
    leases = Leases(lambda: now)
    serving = replace(SERVING, moving_to=LayerRange(0, 8))
    for said, age_s in (
        (JOINING, 0.0),
        (LOADING, 1.0),
        (LOADING_MORE, 2.0),
        (SERVING, 0.0),
        (serving, 0.0),
        (serving, 1.0),
        (replace(serving, moving_to=LayerRange(0, 9)), 0.0),
    ):
        leases.watch([said])
        assert leases.age_s(STRANGER.peer_id) == age_s
        now += 1.0
