"""What a peer refuses before it does anything."""

from __future__ import annotations

import pytest

from peers.server import serve
from swarm.config import NetworkSettings, PeerSettings, Settings
from swarm.errors import ConfigError


async def test_initial_peers_that_cannot_be_dialled_are_refused_before_layers_are_loaded() -> None:
    network = NetworkSettings(initial_peers=("/ip4/127.0.0.1/tcp/4001",))
    events: list[dict[str, object]] = []
    with pytest.raises(ConfigError, match="lacks the peer id"):
        await serve(Settings(peer=PeerSettings(layers="0:1"), network=network), events.append)
    assert events == []
