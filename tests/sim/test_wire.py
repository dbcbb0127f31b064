"""Sessions whose rows are rounded on their way give the tokens of an undisturbed one, wherever replacements are cut."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from swarm.delegation import DelegatedSession
from swarm.sampling import SamplingParams
from swarm.session import Session
from swarm.stepping import StepSession
from swarm.testing import SimTransport
from swarm.transcript import Generated, GenerationRequest
from swarm.types import LayerRange
from swarm.wire import Wire
from tests.sim.test_faults import caught_within
from tests.sim.world import PROFILE, SETTINGS, Outcome, World, run_virtual

THIRDS = [LayerRange(0, 2), LayerRange(2, 4), LayerRange(4, 6)]
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
INT8 = Wire("int8")


async def swarm_of(seed: int, *ranges: LayerRange) -> World:
    world = World(seed)
    for layers in ranges:
        await world.add_peer(layers)
    return world


async def rounded(world: World, prompt: Sequence[int], tokens: int, schedule: object = None) -> Outcome:
    outcome = await world.generate(list(prompt), tokens, schedule, wire=INT8)
    assert outcome.error is None, outcome.error
    assert outcome.tokens == world.decoder.generate(prompt, tokens, world.seed, frozenset(), outcome.cuts)
    return outcome


def test_rows_are_rounded_at_each_cut() -> None:
    async def main() -> None:
        world = await swarm_of(1, *THIRDS)
        outcome = await rounded(world, PROMPT, 12)
        assert outcome.cuts == [2, 4]
        assert outcome.tokens != world.decoder.generate(PROMPT, 12, world.seed, frozenset())
        await world.settle()

    run_virtual(main)


@pytest.mark.parametrize(
    ("lost", "replacements", "hops"),
    [
        ([0], [LayerRange(0, 2)], ["0:2", "2:4", "4:6"]),
        ([1], [LayerRange(2, 4)], ["0:2", "2:4", "4:6"]),
        ([2], [LayerRange(4, 6)], ["0:2", "2:4", "4:6"]),
        ([1], [LayerRange(2, 3), LayerRange(3, 4)], ["0:2", "2:3", "3:4", "4:6"]),
        ([1, 2], [LayerRange(2, 6)], ["0:2", "2:4", "4:6"]),
        ([0, 1], [LayerRange(0, 3), LayerRange(3, 6)], ["0:2", "2:3", "3:4", "4:6"]),
        ([0, 1, 2], [LayerRange(0, 6)], ["0:2", "2:4", "4:6"]),
    ],
)
def test_a_rebuild_rounds_where_the_first_route_did(
    lost: list[int], replacements: list[LayerRange], hops: list[str]
) -> None:
    async def main() -> None:
        world = await swarm_of(2, *THIRDS)

        def kill(session: Session, index: int) -> None:
            if index == 5 and not session.rebuilds and len(world.peers) == 3:
                for number in lost:
                    world.kill(world.peers[number], forget=True)
                for delay_s, layers in enumerate(replacements, 1):
                    world.later(delay_s, world.add_peer(layers))

        outcome = await rounded(world, PROMPT, 14, kill)
        assert outcome.cuts == [2, 4]
        assert [str(hop.layers) for hop in outcome.routes[-1].route.hops] == hops
        await world.settle()

    run_virtual(main)


def test_a_route_that_began_as_one_peer_is_never_rounded() -> None:
    async def main() -> None:
        world = await swarm_of(3, LayerRange(0, 6))

        def kill(session: Session, index: int) -> None:
            if index == 3 and len(world.peers) == 1:
                world.kill(world.peers[0], forget=True)
                for delay_s, layers in enumerate(THIRDS, 1):
                    world.later(delay_s, world.add_peer(layers))

        outcome = await rounded(world, PROMPT, 10, kill)
        assert outcome.cuts == []
        assert len(outcome.routes[-1].route.hops) == 3
        await world.settle()

    run_virtual(main)


def test_the_next_turn_takes_over_rows_of_the_same_rounding_only() -> None:
    async def main() -> None:
        world = await swarm_of(4, *THIRDS)
        text = [(7 * index) % 64 for index in range(100)]
        first = await rounded(world, text, 4)
        await rounded(world, [*text, *first.tokens, 1], 4)
        computed = [sum(sum(times.values()) for times in p.executor.positions_run.values()) for p in world.peers]
        assert computed == [103 + (105 - 96) + 3] * 3
        outcome = await world.generate(text, 4)
        assert outcome.tokens == world.decoder.generate(text, 4, world.seed, frozenset())
        await rounded(world, text, 4)
        await world.settle()

    run_virtual(main)


def test_a_first_route_that_failed_leaves_no_rows_that_were_rounded_where_it_was_cut() -> None:
    """Those of an earlier session, that its hops took over."""

    async def main() -> None:
        world = await swarm_of(4, *THIRDS)
        text = [(7 * index) % 64 for index in range(100)]
        await rounded(world, text, 4)
        for layers in (LayerRange(2, 3), LayerRange(3, 4)):
            await world.add_peer(layers)
        world.peers[1].service.drain()  # and nobody knows yet
        outcome = await rounded(world, text, 12)
        assert outcome.cuts == [2, 3, 4]
        await world.settle()

    run_virtual(main)


def test_the_next_owner_of_a_session_rounds_where_the_first_one_did() -> None:
    async def main() -> None:
        world = await swarm_of(5, *THIRDS, LayerRange(0, 6), LayerRange(0, 6))
        owners = world.peers[3:]
        for owner in owners:  # they serve nothing: only they would give a route without a cut
            world.directory.known.pop(owner.node.address.peer_id)
        request = GenerationRequest(tuple(PROMPT), 20, SamplingParams(seed=5), frozenset(), wire=INT8)
        via = [peer.node.address for peer in owners]
        session = DelegatedSession(SimTransport(world.owner), via, PROFILE, request, world.settings)
        tokens: list[int] = []
        async with session:
            async for event in session.events():
                if isinstance(event, Generated):
                    tokens.append(event.token_id)
                    if len(tokens) == 7:
                        world.kill(owners[0], forget=False)
                        world.announce(owners[1])
                        for peer in world.peers[:3]:
                            world.kill(peer, forget=True)
        assert tokens == world.decoder.generate(PROMPT, 20, 5, frozenset(), [2, 4])
        await world.settle()

    run_virtual(main)


def test_step_mode_rounds_where_it_began_even_after_all_stages_were_given_back() -> None:
    async def main() -> None:
        settings = replace(SETTINGS, inference=replace(SETTINGS.inference, wire="int8"))
        world = World(6, settings=settings)
        for layers in THIRDS:
            await world.add_peer(layers)
        tokens = [*PROMPT, 7, 7]
        states = world.decoder.run_all(world.decoder.caches(64, [2, 4]), tokens)
        session = StepSession(SimTransport(world.owner), world.directory, PROFILE, 64, settings, world.health)
        async with session:
            assert (await session.run(tokens[:9], 0)).logits == world.decoder.logits(states[:9])
            world.kill(world.peers[2], forget=True)
            await world.add_peer(LayerRange(3, 6))
            assert (await session.run(tokens, 5)).logits == world.decoder.logits(states[5:])
            await asyncio.sleep(2 * settings.timeouts.evictable_after_s)
            for peer in world.peers:
                world.kill(peer, forget=True)
            await world.add_peer(LayerRange(0, 6))
            await asyncio.sleep(1)
            assert (await session.run(tokens, 0)).logits == world.decoder.logits(states)
            assert [str(hop.layers) for hop in session.route.hops] == ["0:2", "2:4", "4:6"]
        await world.settle()

    run_virtual(main)


@pytest.mark.parametrize("rule", ["into", "pieces"])
def test_rounding_elsewhere_after_a_rebuild_is_caught(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def into(self: Wire, layer: int) -> str:
        return self.name

    def pieces(self: Wire, layers: LayerRange) -> list[LayerRange]:
        return [layers]

    monkeypatch.setattr(Wire, rule, {"into": into, "pieces": pieces}[rule])
    assert caught_within(400) is not None
