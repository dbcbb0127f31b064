"""A long prompt goes through all stages at once: the time to its first token against an ideal pipeline's. And many long
prompts at slow stages."""

from __future__ import annotations

import asyncio
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


def test_sessions_for_which_others_have_to_be_computed_first_are_not_given_up() -> None:
    """What a stage had computed that is given up while it waits for its turn is computed again, so all wait longer."""
    sessions, chunk_s = 12, 4.0

    async def main() -> None:
        world = World(2, settings=replace(SETTINGS, engine=config.EngineSettings(prefill_chunk_tokens=CHUNK)))
        for layers in (LayerRange(0, 3), LayerRange(3, 6)):
            peer = await world.add_peer(layers)
            peer.executor.layer_s = chunk_s / len(layers) / (1 + CHUNK / 8)
        prompts = [[first, *range(2 * CHUNK - 1)] for first in range(sessions)]
        for outcome in await asyncio.gather(*(world.generate(prompt, 2) for prompt in prompts)):
            assert outcome.error is None
            assert not outcome.session.rebuilds
        await world.settle()

    timeouts = SETTINGS.timeouts
    assert sessions * chunk_s > timeouts.step_floor_s * timeouts.step_slow_factor, "else this shows nothing"
    run_virtual(main)
