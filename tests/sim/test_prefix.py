"""A chat's next turn computes only what is new, and gives the same tokens, whatever happens to whom."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from peers.delegation import MOST_CLIENTS
from swarm.delegation import DelegatedSession
from swarm.sampling import SamplingParams
from swarm.session import Session
from swarm.testing import Faults, SimNode, SimTransport
from swarm.transcript import GenerationRequest
from swarm.transport import DELEGATE
from tests.sim.schedules import Troublemaker, random_faults, random_ranges
from tests.sim.world import PROFILE, SETTINGS, LayerRange, Outcome, World, run_virtual

THIRDS = [LayerRange(0, 2), LayerRange(2, 4), LayerRange(4, 6)]
TEXT = [(7 * index) % 64 for index in range(100)]


async def thirds(seed: int, copies: int = 1, **options: object) -> World:
    world = World(seed, **options)  # type: ignore[arg-type]
    for layers in THIRDS * copies:
        await world.add_peer(layers)
    return world


async def turn(world: World, prompt: list[int], tokens: int = 12, schedule: object = None, **extra: object) -> Outcome:
    outcome = await world.generate(prompt, tokens, schedule, **extra)
    assert outcome.error is None, outcome.error
    assert outcome.tokens == world.decoder.generate(prompt, tokens, world.seed, frozenset())
    return outcome


def rows_run(world: World) -> list[int]:
    return [sum(sum(times.values()) for times in peer.executor.positions_run.values()) for peer in world.peers]


def in_world(story: Callable[[], Awaitable[None]]) -> None:
    run_virtual(story)


def test_the_next_turn_computes_only_what_is_new() -> None:
    async def main() -> None:
        world = await thirds(1)
        first = await turn(world, TEXT)
        before = rows_run(world)
        await turn(world, [*TEXT, *first.tokens, 5, 6, 7])
        known = (len(TEXT) + 12) // 32 * 32
        assert [now - then for then, now in zip(before, rows_run(world), strict=True)] == [115 - known + 11] * 3
        assert all(peer.service.table.budget.kept_bytes > 0 for peer in world.peers)
        await world.settle()

    in_world(main)


def test_the_same_prompt_again_still_runs_its_last_token() -> None:
    async def main() -> None:
        world = await thirds(2)
        prompt = TEXT[:96]
        await turn(world, prompt, 4)
        before = rows_run(world)
        await turn(world, prompt, 4)
        assert [now - then for then, now in zip(before, rows_run(world), strict=True)] == [32 + 3] * 3
        await world.settle()

    in_world(main)


@pytest.mark.parametrize("how", ["no_kv_cache", "setting", "another text"])
def test_nothing_is_taken_over(how: str) -> None:
    async def main() -> None:
        kept = how != "setting"
        world = await thirds(3, settings=replace(SETTINGS, peer=replace(SETTINGS.peer, prefix_cache=kept)))
        extra = {"no_kv_cache": True} if how == "no_kv_cache" else {}
        await turn(world, TEXT, 2, **extra)
        before = rows_run(world)
        await turn(world, [*TEXT, 1] if how != "another text" else [9, *TEXT], 2, **extra)
        rows = [now - then for then, now in zip(before, rows_run(world), strict=True)]
        assert min(rows) >= len(TEXT) + 1
        await world.settle()

    in_world(main)


def test_what_was_kept_is_for_its_owner_alone() -> None:
    async def main() -> None:
        world = await thirds(4)
        await turn(world, TEXT, 2)
        other = world.network.add("another owner")
        request = GenerationRequest(tuple(TEXT), 2, SamplingParams(temperature=0.0, seed=world.seed), frozenset())
        before = rows_run(world)
        # The same secret key, and so the same names: what keeps them apart is who says them.
        session = Session(SimTransport(other), world.directory, PROFILE, request, world.settings, world.health)
        async with session:
            async for _ in session.events():
                pass
        assert [now - then for then, now in zip(before, rows_run(world), strict=True)] == [len(TEXT) + 1] * 3
        await world.settle()

    in_world(main)


def test_what_was_kept_of_a_thin_client_is_for_that_client_alone() -> None:
    """One owner computes for all of them, and the time to the first token would tell what another one asked."""

    async def main() -> None:
        world = await thirds(5)
        via = [world.peers[1].node.address]

        async def ask(client: SimNode) -> list[int]:
            request = GenerationRequest(tuple(TEXT), 2, SamplingParams(temperature=0.0), frozenset())
            before = rows_run(world)
            async with DelegatedSession(SimTransport(client), via, PROFILE, request, world.settings) as session:
                async for _ in session.events():
                    pass
            await asyncio.sleep(1)
            return [now - then for then, now in zip(before, rows_run(world), strict=True)]

        one, other = world.network.add("one"), world.network.add("other")
        everything = [len(TEXT) + 1] * 3
        assert await ask(one) == everything
        assert await ask(other) == everything
        assert await ask(one) == [len(TEXT) + 1 - 96] * 3
        for number in range(MOST_CLIENTS):
            assert await ask(world.network.add(f"stranger{number}")) == everything
        handler = world.peers[1].node.handlers[DELEGATE].__self__  # type: ignore[attr-defined]
        assert len(handler._prefixes) == MOST_CLIENTS
        await world.settle()

    in_world(main)


def test_a_chat_goes_back_to_its_peers() -> None:
    async def main() -> None:
        world = await thirds(5, copies=3)
        for peer in world.peers:
            peer.executor.layer_s = 0.005
            world.announce(peer)
        prompt = list(TEXT)
        routes = []
        for _ in range(4):
            outcome = await turn(world, prompt)
            routes.append(outcome.session.route)
            prompt = [*prompt, *outcome.tokens, 1]
        others = [(await turn(world, [place, *TEXT])).session.route for place in range(8)]
        assert len(set(routes)) == 1
        assert len(set(others)) > 1, "else this test shows nothing"
        await world.settle()

    in_world(main)


def test_a_lost_peer_of_the_last_turn_is_replaced_and_the_others_need_nothing_again() -> None:
    async def main() -> None:
        world = await thirds(6)
        await turn(world, TEXT, 4)
        world.kill(world.peers[1], forget=True)
        await world.add_peer(THIRDS[1])
        before = rows_run(world)
        await turn(world, [*TEXT, 1], 4)
        rows = [now - then for then, now in zip(before, rows_run(world), strict=True)]
        assert (rows[0], rows[2]) == (101 - 96 + 3, 101 - 96 + 3)
        assert rows[3] == 101 + 3
        await world.settle()

    in_world(main)


def test_a_leaving_peer_keeps_nothing() -> None:
    async def main() -> None:
        world = await thirds(7)
        await turn(world, TEXT, 2)
        await asyncio.sleep(1.0)
        assert len(world.peers[0].service.table.prefixes) == 1
        world.drain(world.peers[0])
        assert world.peers[0].service.table.budget.kept_bytes == 0
        await world.settle()

    in_world(main)


@pytest.mark.parametrize("first", range(0, 120, 20))
def test_the_tokens_of_every_turn_are_right_through_any_accidents(first: int) -> None:
    for seed in range(first, first + 20):
        in_world(lambda seed=seed: chat_with_accidents(seed))  # type: ignore[misc]


async def chat_with_accidents(seed: int) -> None:
    rng = random.Random(seed)
    settings = replace(SETTINGS, peer=replace(SETTINGS.peer, checkpoints=rng.random() < 0.8))
    echo = rng.choice((0.0, 0.9))
    world = World(seed, Faults(slow=rng.choice((0.0, 0.02))), settings, echo)
    for layers in random_ranges(rng):
        await world.add_peer(layers)
    prompt = [rng.randrange(64) for _ in range(rng.randrange(20, 90))]
    for _ in range(3):
        tokens = rng.randrange(4, 30)
        trouble = Troublemaker(world, random_faults(rng, tokens)[:2], rng)
        outcome = await world.generate(prompt, tokens, trouble.on_token, speculate=rng.random() < 0.7)
        story = f"seed {seed}, rebuilds {outcome.session.rebuilds}"
        assert outcome.error is None, f"{outcome.error!r}; {story}"
        assert outcome.tokens == world.decoder.generate(prompt, tokens, seed, frozenset()), story
        await trouble.done()
        kept = rng.randrange(len(prompt) // 2, len(prompt) + len(outcome.tokens) + 1)  # a turn may be asked anew
        prompt = [*prompt, *outcome.tokens][:kept] + [rng.randrange(64) for _ in range(rng.randrange(1, 40))]
    await world.settle()
