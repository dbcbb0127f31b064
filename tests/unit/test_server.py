"""What a peer refuses before it does anything."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest

from peers.peer import Peer
from peers.server import _compare_model, serve
from swarm.config import NetworkSettings, PeerSettings, Settings
from swarm.errors import ConfigError
from swarm.identity import Identity
from swarm.testing import SimTransport
from swarm.types import LayerRange, ModelId, PeerAddress, PeerId
from tests.sim.world import PROFILE, SETTINGS, World, run_virtual


async def test_initial_peers_that_cannot_be_dialled_are_refused_before_layers_are_loaded() -> None:
    network = NetworkSettings(initial_peers=("/ip4/127.0.0.1/tcp/4001",))
    events: list[dict[str, object]] = []
    with pytest.raises(ConfigError, match="lacks the peer id"):
        await serve(Settings(peer=PeerSettings(layers="0:1"), network=network), events.append)
    assert events == []


@pytest.mark.parametrize("weights", ["auto", "int4"])
def test_a_peer_is_told_if_the_initial_peers_serve_the_same_model_with_other_weights(weights: str) -> None:
    mine = PROFILE if weights == "auto" else replace(PROFILE, model_id=ModelId("toy@1"), weights=weights)
    events: list[dict[str, object]] = []

    async def main() -> None:
        world = World(1)
        given = (await world.add_peer(LayerRange(0, 2))).node.address
        transport, identity = SimTransport(world.owner), Identity.ephemeral()
        joining = SimpleNamespace(
            profile=mine, settings=SETTINGS, identity=identity, transport=transport, report=events.append
        )
        await _compare_model(cast(Peer, joining), [given, PeerAddress(PeerId("nobody"))])

    run_virtual(main)
    told = [str(event["message"]) for event in events]
    serve = f"the initial peers serve {PROFILE.model_id} (float32), this peer toy@1 (float32, int4 weights): another"
    assert told == ([] if weights == "auto" else [f"{serve} model, which shares no route with theirs"])
