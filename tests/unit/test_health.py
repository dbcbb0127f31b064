from __future__ import annotations

from swarm.health import FULL_S, PENALTY_COST_S, Health
from swarm.types import PeerId

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
