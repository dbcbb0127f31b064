"""What drafts are worth on slow links, by the simulator's clock; and that nobody gets them who did not ask."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace

import swarm.config as config
from swarm.session import Session
from tests.sim.world import SETTINGS, Faults, LayerRange, Outcome, SimPeer, World, run_virtual

LINK_S, LAYER_S, TOKENS = 0.05, 0.004, 150
THIRDS = [LayerRange(0, 2), LayerRange(2, 4), LayerRange(4, 6)]
WIDE = replace(SETTINGS, engine=config.EngineSettings())


def generate(echo: float, seed: int = 5, **wishes: object) -> tuple[Outcome, float]:
    """A generation over three stages, and the seconds from its first token to its last."""

    async def main() -> tuple[Outcome, float]:
        world = World(seed, Faults(latency_s=(LINK_S, LINK_S)), settings=WIDE, echo=echo)
        for layers in THIRDS:
            (await world.add_peer(layers)).executor.layer_s = LAYER_S
        times: list[float] = []
        prompt = [3, 1, 4, 1, 5, 9, 2, 6] * 3
        outcome = await world.generate(
            prompt, TOKENS, lambda *_: times.append(asyncio.get_running_loop().time()), **wishes
        )
        assert outcome.error is None
        assert outcome.tokens == world.decoder.generate(prompt, TOKENS, seed, frozenset())
        await world.settle()
        return outcome, times[-1] - times[1]

    return run_virtual(main)


def test_without_drafts_a_token_takes_the_layers_and_the_links() -> None:
    outcome, seconds = generate(0.97)
    assert outcome.drafts_right == 0
    step_s = 6 * LAYER_S * (1 + 1 / 8) + 3 * LINK_S
    assert seconds / (TOKENS - 1) < 1.02 * step_s


def test_drafts_make_repetitive_text_three_times_as_fast_over_slow_links() -> None:
    plain, drafted = generate(0.97)[1], generate(0.97, speculate=True)[1]
    assert plain / drafted > 3


def test_drafts_cost_nothing_on_text_that_does_not_repeat_itself() -> None:
    for seed in range(3):
        plain, drafted = generate(0.0, seed)[1], generate(0.0, seed, speculate=True)[1]
        assert plain / drafted > 0.98


def test_without_a_kv_cache_nothing_is_drafted() -> None:
    assert generate(0.97, speculate=True, no_kv_cache=True)[0].drafts_right == 0


def test_a_draft_that_was_right_while_the_route_broke_holds_nobody_up() -> None:
    """The last stage puts out several tokens, and before they reach the owner it has asked that stage to go on after
    those that it knew."""
    slow = replace(SETTINGS, timeouts=replace(SETTINGS.timeouts, step_floor_s=20.0))

    async def main(seed: int) -> None:
        world = World(seed, Faults(latency_s=(0.03, 0.03)), settings=slow, echo=0.95)
        for layers in [*THIRDS, *THIRDS]:
            (await world.add_peer(layers)).executor.layer_s = LAYER_S
        came: list[float] = []

        def kill_later(session: Session, index: int) -> None:
            came.append(asyncio.get_running_loop().time())
            if index == 30 and not session.rebuilds:
                victim = world.peer_of(session, 1)
                world.later(world.rng.uniform(0.0, 0.1), kill(victim))

        async def kill(victim: SimPeer) -> None:
            world.kill(victim, forget=True)

        outcome = await world.generate([3, 1, 4, 1, 5, 9, 2, 6] * 3, 60, kill_later, speculate=True)
        assert outcome.error is None
        assert len(outcome.session.rebuilds) == 1
        assert max(b - a for a, b in itertools.pairwise(came)) < 5.0
        await world.settle()

    for seed in range(60):
        run_virtual(lambda seed=seed: main(seed))
