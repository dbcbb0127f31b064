"""A long prompt goes through all stages at once: the time to its first token against an ideal pipeline's. And many long
prompts at slow stages, and on narrow lines."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace

import pytest

import swarm.config as config
from swarm.session import Session
from tests.sim.world import SETTINGS, Faults, LayerRange, World, run_virtual

STAGES = (LayerRange(0, 1), LayerRange(1, 3), LayerRange(3, 4), LayerRange(4, 6))
CHUNK = 32
CHUNKS = 12
"""As many as 1,500 tokens are with the default settings."""
LIMIT = 1.4


@pytest.mark.parametrize("link_s", [0.0005, 0.02, 0.05])
@pytest.mark.parametrize("chunk_s", [0.03, 0.1])
def test_four_equal_stages_work_at_the_same_time(link_s: float, chunk_s: float) -> None:
    engine = config.EngineSettings(prefill_chunk_tokens=CHUNK)

    async def first_token_s() -> float:
        world = World(1, Faults(latency_s=(link_s, link_s)), replace(SETTINGS, engine=engine))
        for layers in STAGES:
            peer = await world.add_peer(layers)
            peer.executor.layer_s = chunk_s / len(layers) / (1 + CHUNK / 8)
        loop = asyncio.get_running_loop()
        began, first = loop.time(), []

        def on_event(session: Session, index: int) -> None:
            if index == 0:
                first.append(loop.time() - began)

        done = await world.generate([token % 60 for token in range(CHUNK * CHUNKS)], 2, on_event)
        assert done.error is None
        assert len(done.routes[-1].route.hops) == len(STAGES)
        await world.settle()
        return first[0]

    ideal_s = CHUNKS * chunk_s + len(STAGES) * link_s
    taken_s = run_virtual(first_token_s)
    print(f"{taken_s / ideal_s:.3f} of the ideal time")
    assert ideal_s < taken_s < LIMIT * ideal_s + 4 * link_s, "and two round trips to open the session"


SESSIONS, SLOW_S = 12, 4.0
BACK = LayerRange(3, 6)


@pytest.mark.parametrize("killed", [False, True])
def test_stages_for_which_others_have_to_be_computed_first_are_not_given_up(killed: bool) -> None:
    """Not by owners that wait for a token, and not by those that rebuild the route behind them. All that they had would
    be computed again, and all wait longer."""

    async def main() -> None:
        world = World(2, settings=replace(SETTINGS, engine=config.EngineSettings(prefill_chunk_tokens=CHUNK)))
        for layers in (LayerRange(0, 3), BACK, BACK):
            peer = await world.add_peer(layers)
            peer.executor.layer_s = SLOW_S / len(layers) / (1 + CHUNK / 8)
        prompts = [[first, *range(2 * CHUNK - 1)] for first in range(SESSIONS)]
        generations = [asyncio.create_task(world.generate(prompt, 2)) for prompt in prompts]
        if killed:
            await asyncio.sleep(1.5 * SLOW_S)
            world.kill(max(world.peers[1:], key=lambda peer: len(peer.service.table.runners)), forget=True)
        outcomes = await asyncio.gather(*generations)
        for prompt, outcome in zip(prompts, outcomes, strict=True):
            assert outcome.error is None
            assert outcome.tokens == world.decoder.generate(prompt, 2, 2, frozenset())
        lost = {hop.layers for outcome in outcomes for rebuild in outcome.session.rebuilds for hop in rebuild.lost}
        assert lost == ({BACK} if killed else set())
        await world.settle()

    wait_s, timeouts = SESSIONS * SLOW_S, SETTINGS.timeouts
    assert wait_s > max(timeouts.step_floor_s * timeouts.step_slow_factor, timeouts.open_s), "else this shows nothing"
    run_virtual(main)


def test_long_prompts_that_wait_at_a_slow_peer_never_take_more_memory_than_their_caches_will() -> None:
    sessions, positions = 24, 4 * CHUNK

    async def main() -> None:
        world = World(2, settings=replace(SETTINGS, engine=config.EngineSettings(prefill_chunk_tokens=CHUNK)))
        for layers in (LayerRange(0, 3), BACK):
            await world.add_peer(layers)
        slow = world.peers[1]
        slow.executor.layer_s = 0.5 / len(BACK) / (1 + CHUNK / 8)
        table, seen = slow.service.table, [0]
        table.budget.limit_bytes = sessions * slow.executor.cache_bytes(BACK, positions + 8)
        table.most_waiting_bytes, bound_waiting = table.budget.limit_bytes, table.bound_waiting

        def note_and_bound() -> None:
            seen.append(sum(runner.waiting_bytes for runner in table.runners.values()))
            bound_waiting()

        table.bound_waiting = note_and_bound  # type: ignore[method-assign]
        prompts = [[first, *(token % 60 for token in range(positions - 1))] for first in range(sessions)]
        outcomes = await asyncio.gather(*(world.generate(prompt, 2) for prompt in prompts))
        for prompt, outcome in zip(prompts, outcomes, strict=True):
            assert outcome.tokens == world.decoder.generate(prompt, 2, 2, frozenset())
            assert outcome.session.rebuilds == []
        print(f"{max(seen)} bytes waited of {table.most_waiting_bytes}")
        assert max(seen) > sessions * positions * 8 / 2, "else this shows nothing"
        await world.settle()

    run_virtual(main)


def test_a_line_stays_open_while_the_peer_at_its_end_has_frames_to_compute() -> None:
    """It was closed as idle, and the peer could not say when it had computed them: nothing more was sent."""

    async def main() -> None:
        timeouts = replace(SETTINGS.timeouts, link_idle_s=2.0)
        settings = replace(SETTINGS, engine=config.EngineSettings(prefill_chunk_tokens=CHUNK), timeouts=timeouts)
        world = World(2, settings=settings)
        for layers in (LayerRange(0, 3), BACK):
            await world.add_peer(layers)
        world.peers[1].executor.layer_s = 6.0 / len(BACK) / (1 + CHUNK / 8)
        prompt = [token % 60 for token in range(11 * CHUNK)]
        assert len(prompt) // CHUNK > settings.limits.window_frames, "else this shows nothing"
        outcome = await world.generate(prompt, 2)
        assert outcome.error is None
        assert outcome.session.rebuilds == []
        await asyncio.sleep(4 * timeouts.link_idle_s)
        assert all(not peer.service._router._links._links for peer in world.peers), "nobody uses them now"
        await world.settle()

    run_virtual(main)


NARROW = 130.0
"""Bytes a second: a chunk takes as long as one of SmolLM2 takes at 1 Mbit/s."""


@pytest.fixture
def small_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy's are, and so is what its narrow lines can have under way."""
    monkeypatch.setattr("peers.line.FIRST_BYTES", 150)
    monkeypatch.setattr("peers.line.TELLING_BYTES", 100)


async def narrow_world(sessions: int) -> tuple[World, list[list[int]]]:
    """Three peers with narrow lines between them, and long prompts."""
    engine = config.EngineSettings(prefill_chunk_tokens=CHUNK, replay_chunk_tokens=2 * CHUNK)
    world = World(2, Faults(latency_s=(0.02, 0.02)), replace(SETTINGS, engine=engine))
    for layers in (LayerRange(0, 3), BACK, BACK):
        (await world.add_peer(layers)).executor.layer_s = 0.001
    names = [peer.node.address.peer_id for peer in world.peers]
    world.network.bytes_per_s = dict.fromkeys(itertools.permutations(names, 2), NARROW)
    return world, [[first, *(token % 60 for token in range(4 * CHUNK - 1))] for first in range(sessions)]


@pytest.mark.usefixtures("small_rows")
@pytest.mark.parametrize(("sessions", "killed"), [(3, False), (8, False), (2, True)])
def test_long_prompts_on_narrow_lines_are_waited_for(sessions: int, killed: bool) -> None:
    """They were given up, and all of them sent again, behind what was still under way: until all had failed."""

    async def main() -> None:
        world, prompts = await narrow_world(sessions)
        generations = [asyncio.create_task(world.generate(prompt, 3)) for prompt in prompts]
        if killed:
            await asyncio.sleep(3)
            world.kill(max(world.peers[1:], key=lambda peer: len(peer.service.table.runners)), forget=True)
        outcomes = await asyncio.gather(*generations)
        for prompt, outcome in zip(prompts, outcomes, strict=True):
            assert outcome.error is None
            assert outcome.tokens == world.decoder.generate(prompt, 3, 2, frozenset())
        rebuilds = [rebuild for outcome in outcomes for rebuild in outcome.session.rebuilds]
        assert len(rebuilds) == (sessions if killed else 0)
        await world.settle()

    run_virtual(main)


@pytest.mark.usefixtures("small_rows")
def test_a_token_does_not_wait_for_all_of_anothers_prompt() -> None:
    async def main() -> None:
        world, [prompt] = await narrow_world(1)
        world.kill(world.peers.pop(), forget=True)  # all go the same way
        clock, came_at = asyncio.get_running_loop().time, [0.0]
        tokens = asyncio.create_task(world.generate([1, 2, 3], 60, lambda *_: came_at.append(clock())))
        await asyncio.sleep(5)
        began = clock()
        outcome = await world.generate(prompt, 1)
        meanwhile = [at for at in came_at if began < at < clock()]
        print(f"a prompt of {clock() - began:.1f} s, {len(meanwhile)} tokens meanwhile")
        assert outcome.error is None
        gaps = [after - before for before, after in itertools.pairwise(meanwhile)]
        assert max(gaps) < 0.3 * (clock() - began)
        tokens.cancel()
        await asyncio.gather(tokens, return_exceptions=True)
        await world.settle()

    run_virtual(main)
