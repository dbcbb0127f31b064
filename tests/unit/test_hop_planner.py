"""A session's question to the planner: who replaces a lost hop between those that are left."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from swarm.config import Settings
from swarm.errors import NoRoute, Unreachable
from swarm.health import Health
from swarm.hop_planner import HopPlanner
from swarm.link_times import Links, LinkTime
from swarm.prefix import SessionPrefix
from swarm.sampling import SamplingParams
from swarm.testing import Directory
from swarm.transcript import GenerationRequest, Transcript
from swarm.types import Announcement, Hop, LayerRange, PeerAddress, PeerId, PeerState, SessionId
from tests.sim.world import PROFILE

LAYERS = PROFILE.num_layers
THIRD = LAYERS // 3
THIRDS = [LayerRange(0, THIRD), LayerRange(THIRD, 2 * THIRD), LayerRange(2 * THIRD, LAYERS)]


def peer(name: str, layers: LayerRange, layer_s: float = 0.001, kv_tokens_free: int = 1000) -> Announcement:
    return Announcement(
        peer=PeerAddress(PeerId(name)),
        model=PROFILE.model_id,
        layers=layers,
        state=PeerState.SERVING,
        version="0",
        decode_s_per_layer=layer_s,
        prefill_s_per_token_layer=0.0001,
        kv_tokens_free=kv_tokens_free,
    )


@dataclass
class Linked(Directory):
    times: Links = field(default_factory=Links)

    def links(self) -> Links:
        return self.times


class Looked(Directory):
    async def refresh(self) -> None:
        pass


def planner_of(view: Directory, session: str, tokens: int) -> HopPlanner:
    """For a session of so many tokens, three of them the prompt's."""
    request = GenerationRequest((1, 2, 3), tokens - 3, SamplingParams(), frozenset())
    transcript, health = Transcript(request, tokens, PROFILE.vocab_size), Health(60.0)
    prefix = SessionPrefix(health.prefixes, PROFILE.model_id, transcript)
    return HopPlanner(SessionId(session), transcript, prefix, view, PROFILE, Settings(), health)


@pytest.mark.parametrize("lost", range(3))
@pytest.mark.parametrize("to_the_next", [True, False])
async def test_a_lost_hop_is_replaced_by_the_peer_with_the_best_ways_to_its_neighbours_round_the_ring(
    lost: int, to_the_next: bool
) -> None:
    """The last hop sends tokens to the first: the one that replaces either has a neighbour there, too."""
    survivors = [Hop(PeerAddress(PeerId(f"s{i}")), THIRDS[i]) for i in range(3) if i != lost]
    neighbour = PeerId(f"s{(lost + (1 if to_the_next else -1)) % 3}")
    near, far = PeerId("near"), PeerId("far")
    ways = {(a, b): LinkTime(0.01) for a in (near, far) for b in (PeerId(f"s{i}") for i in range(3))}
    ways |= {(b, a): link for (a, b), link in ways.items()}
    ways[(far, neighbour) if to_the_next else (neighbour, far)] = LinkTime(0.1)
    known = {a.peer.peer_id: a for a in (peer("far", THIRDS[lost]), peer("near", THIRDS[lost]))}
    for name in ("one", "another", "a third"):
        planner = planner_of(Linked(known, times=Links(ways)), name, 7)
        assert [hop.peer.peer_id for hop in planner.plan(THIRDS[lost], (), survivors)] == [near]


async def test_the_checkpoint_log_of_a_part_takes_room_too() -> None:
    """Of a peer that has room for 4 tokens in 6 layers: 12 tokens in 2 layers fit it only without the log."""
    small, large = (peer(name, LayerRange(0, LAYERS), *facts) for name, *facts in (("s", 0.001, 4), ("l", 0.1, 1000)))
    planner = planner_of(Directory({a.peer.peer_id: a for a in (small, large)}), "one", 12)
    hops = planner.plan(LayerRange(0, LAYERS), (), ())
    assert PROFILE.log_layers == 1.0
    assert {hop.peer.peer_id: len(hop.layers) for hop in hops} == {"s": 1, "l": 5}


async def test_a_new_session_that_cannot_reach_the_only_peer_says_so_once_and_that_waiting_may_help() -> None:
    known = {a.peer.peer_id: a for a in (peer("dead", THIRDS[0]), peer("two", THIRDS[1]), peer("three", THIRDS[2]))}
    planner, refused = planner_of(Looked(known), "one", 7), {PeerId("dead"): Unreachable("nothing listens there")}
    whole = LayerRange(0, LAYERS)
    with pytest.raises(NoRoute) as first:
        planner.plan(whole, refused, ())
    with pytest.raises(NoRoute) as told:
        await planner.explain(first.value, refused)
    assert told.value.message == (
        f"nobody serves layers {THIRDS[0]}, except dead [{THIRDS[0]}]: it can't be reached, or is leaving; "
        "another may be loading these layers: try again in a moment"
    )
