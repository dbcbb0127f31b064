"""A session's keys and values are kept alike at all of its stages, whoever comes and goes."""

from __future__ import annotations

import pytest

from swarm.delegation import DelegatedSession
from swarm.errors import BadRequest
from swarm.sampling import SamplingParams
from swarm.session import Session
from swarm.testing import SimTransport
from swarm.transcript import Generated, GenerationRequest
from tests.sim.world import PROFILE, LayerRange, World, run_virtual

PROMPT = (3, 1, 4, 1, 5)


async def halves(seed: int) -> World:
    world = World(seed)
    for layers in (LayerRange(0, 3), LayerRange(3, 6), LayerRange(0, 3), LayerRange(3, 6)):
        await world.add_peer(layers)
    return world


def kinds(world: World) -> set[str]:
    return {kind for peer in world.peers for kind in peer.executor.kinds}


def test_replacements_keep_them_as_the_first_stages_did() -> None:
    async def main() -> None:
        world = await halves(1)

        def at(session: Session, index: int) -> None:
            if index == 4 and not session.rebuilds:
                world.kill(world.peer_of(session, 1), forget=True)

        outcome = await world.generate(list(PROMPT), 12, at, kv="int8")
        assert outcome.error is None
        assert len(outcome.session.rebuilds) == 1
        assert kinds(world) == {"int8"}
        await world.settle()

    run_virtual(main)


def test_the_next_owner_of_a_delegated_session_keeps_the_choice() -> None:
    async def main() -> None:
        world = await halves(2)
        request = GenerationRequest(PROMPT, 12, SamplingParams(seed=2), frozenset(), kv="int8")
        via = [world.peers[0].node.address, world.peers[2].node.address]
        session = DelegatedSession(SimTransport(world.owner), via, PROFILE, request, world.settings)
        tokens = []
        async with session:
            async for event in session.events():
                if isinstance(event, Generated):
                    tokens.append(event.token_id)
                    if len(tokens) == 4:
                        world.kill(world.peers[0], forget=True)
        assert tokens == world.decoder.generate(PROMPT, 12, 2, frozenset())
        assert kinds(world) == {"int8"}
        await world.settle()

    run_virtual(main)


def test_an_unknown_kind_is_refused_before_anybody_is_asked() -> None:
    with pytest.raises(BadRequest, match="there are: model, int8"):
        GenerationRequest(PROMPT, 12, SamplingParams(), frozenset(), kv="int3")
