from __future__ import annotations

import math

import pytest

from swarm.errors import BadRequest, StreamLost, SwarmError, TooLong, WrongRange
from swarm.health import FIRST_PENALTY_S, FULL_S, PENALTY_COST_S, READ_LATE_S, Health
from swarm.hop_planner import HopPlanner
from swarm.types import Hop, LayerRange, PeerAddress, PeerId

PEER = PeerId("peer")


def test_a_full_peer_is_asked_after_others_for_a_moment_however_often_it_says_so() -> None:
    health = Health(60.0)
    for _ in range(9):
        health.full(PEER, 10.0)
    assert health.costs_s(10.0) == {PEER: PENALTY_COST_S}
    assert health.costs_s(10.0 + FULL_S) == {}
    assert health.cause(PEER) is None


def test_a_failure_counts_for_more_than_a_lack_of_room() -> None:
    health = Health(60.0)
    for _ in range(2):
        health.failed(PEER, "stream_lost", 10.0)
    health.full(PEER, 10.0)
    assert health.costs_s(10.0) == {PEER: 2 * PENALTY_COST_S}


def test_a_peer_that_failed_is_avoided_until_it_is_heard_of_again() -> None:
    health = Health(60.0)
    health.failed(PEER, "stream_lost", 100.0)
    later = 100.0 + FIRST_PENALTY_S + 20.0
    newest = {"from before": later - 95.0, "perhaps from before": later - 100.0 - READ_LATE_S / 2, "new": 1.0}
    assert {name: bool(health.costs_s(later, lambda peer, age=age: age)) for name, age in newest.items()} == {
        "from before": True,
        "perhaps from before": True,
        "new": False,
    }
    health.succeeded(PEER, later)
    assert health.costs_s(later, lambda peer: math.inf) == {}


def test_success_ends_the_penalty_of_one_that_failed_often() -> None:
    health = Health(60.0)
    for _ in range(3):
        health.failed(PEER, "stream_lost", 100.0)
    health.succeeded(PEER, 101.0)
    assert health.costs_s(101.0, lambda peer: math.inf) == {}


@pytest.mark.parametrize(
    ("error", "blamed"),
    [
        (StreamLost("gone"), True),
        (WrongRange("other layers by now"), True),
        (TooLong("more than this peer takes"), False),
        (BadRequest("not so"), False),
    ],
)
async def test_a_peer_is_not_blamed_for_what_is_wrong_with_a_request(error: SwarmError, blamed: bool) -> None:
    health = Health(60.0)
    planner = HopPlanner.__new__(HopPlanner)
    planner._health = health
    planner.blame(Hop(PeerAddress(PEER, ()), LayerRange(0, 2)), error)
    assert (PEER in health._records) == blamed
