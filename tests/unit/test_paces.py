"""A peer that promises more than it gives is reckoned with as it was measured."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest

from swarm.config import PlannerSettings
from swarm.health import Health
from swarm.knowledge import known
from swarm.link_times import Links
from swarm.paces import BELIEVED_S, ENOUGH, as_measured
from swarm.plans import Check
from swarm.routing import plan
from swarm.session import Session
from swarm.transcript import Generated
from swarm.types import Announcement, Hop, HopTiming, LayerRange, ModelId, PeerAddress, PeerId, PeerState

WHOLE = LayerRange(0, 6)


def peer(name: str, layer_s: float) -> Announcement:
    return Announcement(
        peer=PeerAddress(PeerId(name)),
        model=ModelId("toy@0"),
        layers=WHOLE,
        state=PeerState.SERVING,
        version="0",
        decode_s_per_layer=layer_s,
        prefill_s_per_token_layer=layer_s / 8,
        kv_tokens_free=1000,
        step_s=0.001,
        head_s=0.002,
    )


def timing(a: Announcement, layer_s: float, batch: int = 1) -> HopTiming:
    return HopTiming(a.peer.peer_id, a.layers, 0.0, a.step_s + a.head_s + layer_s * len(a.layers), batch)


class Seen:
    @property
    def check(self) -> Check:
        return lambda announcement: None

    def links(self) -> Links:
        return Links()

    def age(self, peer_id: PeerId) -> float:
        return 0.0


LIAR, HONEST = peer("liar", 0.001), peer("honest", 0.002)


def chosen(health: Health, now: float = 0.0) -> PeerId:
    found = plan([LIAR, HONEST], WHOLE, knowledge=known(Seen(), health, now, PlannerSettings()))
    return found.hops[0].hop.peer.peer_id


def counted(health: Health, promised: Announcement) -> Announcement:
    return as_measured(promised, health.paces.measured_s(2.0).get(promised.peer.peer_id))


def test_a_session_finds_a_liar_out_and_the_next_goes_elsewhere() -> None:
    health = Health(120.0)
    assert chosen(health) == "liar"
    for _ in range(ENOUGH):
        health.paces.note(LIAR, timing(LIAR, 0.01), 1.0)
    assert chosen(health, 2.0) == "honest"
    assert abs(counted(health, LIAR).decode_s_per_layer - 0.01) < 1e-9
    assert chosen(health, 2.0 + BELIEVED_S) == "liar", "it may have had a bad moment"


def test_peers_that_are_no_longer_measured_are_forgotten() -> None:
    paces = Health(120.0).paces
    for number in range(100):
        one = peer(f"peer{number}", 0.001)
        paces.note(one, timing(one, 0.01), number * BELIEVED_S / 10)
    assert len(paces._paces) == 11


def test_a_promise_that_is_kept_roughly_stands() -> None:
    health = Health(120.0)
    for _ in range(10):
        health.paces.note(LIAR, timing(LIAR, 0.0014), 1.0)
    assert counted(health, LIAR) is LIAR


def test_few_steps_and_those_shared_with_other_sessions_tell_nothing() -> None:
    health = Health(120.0)
    for _ in range(ENOUGH - 1):
        health.paces.note(LIAR, timing(LIAR, 0.1), 1.0)
    for _ in range(10):
        health.paces.note(LIAR, timing(LIAR, 0.1, batch=4), 1.0)
    assert counted(health, LIAR) is LIAR


def test_what_a_step_and_the_head_take_is_not_counted_against_few_layers() -> None:
    health = Health(120.0)
    part = replace(LIAR, head_s=0.1)
    for _ in range(10):
        health.paces.note(part, HopTiming(part.peer.peer_id, LayerRange(5, 6), 0.0, 0.001 + 0.1 + 0.001, 1), 1.0)
    assert counted(health, part) is part


@pytest.mark.parametrize(
    ("layers", "compute_s", "waited_s", "counts"),
    [
        (WHOLE, 0.1, 0.11, True),
        (WHOLE, 0.1, 0.09, False),  # longer than the owner waited
        (LayerRange(0, 3), 0.1, 0.11, False),  # not what was chosen
    ],
)
def test_what_a_hop_says_of_others_counts_only_if_it_can_be_true(
    layers: LayerRange, compute_s: float, waited_s: float, counts: bool
) -> None:
    health = Health(120.0)
    hop = Hop(HONEST.peer, WHOLE)
    session = cast(Session, SimpleNamespace(_chain=SimpleNamespace(hops=(hop,)), _health=health))
    token = Generated(1, 2, (HopTiming(HONEST.peer.peer_id, layers, 0.0, compute_s, 1),))
    for _ in range(ENOUGH):
        Session._note_paces(session, token, {HONEST.peer.peer_id: HONEST}, waited_s, 1.0)
    assert (HONEST.peer.peer_id in health.paces.measured_s(2.0)) == counts
