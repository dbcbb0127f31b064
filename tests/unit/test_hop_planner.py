"""A session's question to the planner: who replaces a lost hop between those that are left."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from swarm.config import Settings
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


def peer(name: str, layers: LayerRange) -> Announcement:
    return Announcement(
        peer=PeerAddress(PeerId(name)),
        model=PROFILE.model_id,
        layers=layers,
        state=PeerState.SERVING,
        version="0",
        decode_s_per_layer=0.001,
        prefill_s_per_token_layer=0.0001,
        kv_tokens_free=1000,
    )


@dataclass
class Linked(Directory):
    times: Links = field(default_factory=Links)

    def links(self) -> Links:
        return self.times


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
    transcript = Transcript(GenerationRequest((1, 2, 3), 4, SamplingParams(), frozenset()), 7, PROFILE.vocab_size)
    health = Health(60.0)
    prefix = SessionPrefix(health.prefixes, PROFILE.model_id, transcript)
    for name in ("one", "another", "a third"):
        view = Linked(known, times=Links(ways))
        planner = HopPlanner(SessionId(name), transcript, prefix, view, PROFILE, Settings(), health)
        assert [hop.peer.peer_id for hop in planner.plan(THIRDS[lost], (), survivors)] == [near]
