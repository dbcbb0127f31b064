"""What strikes a generation, and when: with peers that are no processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from swarm.chaos import Chaos, _Ordeal
from swarm.client import AsyncStream
from swarm.faults import Fault, Trial
from swarm.session import RouteChanged
from swarm.types import Hop, LayerRange, PeerAddress, PeerId, Route, Token

ALL = LayerRange(0, 2)


class Swarm:
    def __init__(self) -> None:
        self.peers: list[Any] = []
        self.killed: list[PeerId] = []

    def add(self, name: str) -> None:
        child = SimpleNamespace(signal=lambda number: None)
        self.peers.append(SimpleNamespace(peer_id=PeerId(name), layers=ALL, child=child))

    def kill(self, index: int) -> None:
        self.killed.append(self.peers[index].peer_id)


class Stream:
    """Goes on at peer "two" from its second token on."""

    result = None

    def __init__(self, swarm: Swarm) -> None:
        self._swarm = swarm

    async def __aiter__(self) -> AsyncGenerator[RouteChanged | Token, None]:
        for epoch, name in enumerate(("one", "two")):
            route = Route((Hop(PeerAddress(PeerId(name)), ALL),))
            yield RouteChanged(epoch, route, "opened" if epoch == 0 else "lost a peer")
            yield Token(epoch, 7, "a")
            await asyncio.sleep(0.05)
        self._swarm.add("two")  # later than it was found
        await asyncio.sleep(0.2)
        yield Token(2, 7, "a")


@pytest.mark.parametrize(
    ("kind", "token", "killed"), [("kill", 0, ["one"]), ("kill", 1, ["two"]), ("replacement", 0, ["one", "two"])]
)
async def test_a_peer_is_struck_as_soon_as_it_is_known_to_run(kind: str, token: int, killed: list[str]) -> None:
    """One that was started in the middle is on the route before its starter knows who it is."""
    swarm = Swarm()
    swarm.add("one")
    undisturbed = SimpleNamespace(token_ids=[7, 7, 7], timings=SimpleNamespace(ttft_s=0.01))
    chaos = cast(Chaos, SimpleNamespace(swarm=swarm, _expected={False: undisturbed}))
    ordeal = _Ordeal(chaos, 0, Trial(False, (Fault(kind, 0, token, 0.5),)))
    await ordeal.run(cast(AsyncStream, Stream(swarm)))
    ordeal.judge()
    assert swarm.killed == killed
    [seen] = ordeal.observations
    assert seen.identical
