"""Many sessions grow together in too little memory: some give way and come back, all get the tokens of a quiet run."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from dataclasses import replace

import pytest

from peers import stage_table
from peers.stage_table import StageKey, StageTable
from swarm import protocol_pb2 as pb
from swarm.errors import Busy, SwarmError
from swarm.protocol import put_rows
from swarm.session import Session
from swarm.testing import SimTransport
from swarm.transport import CONTROL, LINK
from swarm.types import SessionId
from swarm.wire import row_bytes
from tests.sim import world
from tests.sim.world import NUM_LAYERS, PROFILE, LayerRange, Outcome, World, run_virtual

SEEDS = 60
MUTATION_SEEDS = 40
BOUND_S = 300.0
"""Virtual seconds for all sessions of a seed."""
SETTINGS = replace(
    world.SETTINGS,
    # Nothing is solved by stages that are forgotten in the end.
    timeouts=replace(world.SETTINGS.timeouts, owner_grace_s=100.0),
    recovery=replace(world.SETTINGS.recovery, wait_s=60.0),
)


@pytest.fixture(autouse=True)
def promise_a_lot(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than is sensible, so that somebody has to give way all the time."""
    monkeypatch.setattr(stage_table, "OVERCOMMIT", 6)


def run_seed(seed: int) -> Counter[str]:
    """How often routes changed, by cause; raises ``AssertionError`` with what went wrong."""

    async def main() -> Counter[str]:
        rng = random.Random(seed)
        swarm = World(seed, settings=SETTINGS)
        bounds = [0, *sorted(rng.sample(range(1, NUM_LAYERS), rng.randrange(3))), NUM_LAYERS]
        for start, end in itertools.pairwise(bounds):
            peer = await swarm.add_peer(LayerRange(start, end))
            # One session of full length fits, or nearly two.
            peer.service.table.budget.limit_bytes = rng.randrange(52, 90) * (16 * (end - start) + 8)
        prompts = [[rng.randrange(64) for _ in range(rng.randrange(2, 12))] for _ in range(rng.randrange(3, 7))]
        counts = [rng.randrange(20, 40) for _ in prompts]

        async def generate(prompt: list[int], tokens: int) -> Outcome:
            await asyncio.sleep(rng.uniform(0, 0.3))
            while True:  # whoever is refused at the door asks again, as people do
                outcome = await swarm.generate(prompt, tokens, speculate=rng.random() < 0.3)
                if not (isinstance(outcome.error, Busy) and not outcome.routes):
                    return outcome
                await asyncio.sleep(rng.uniform(0.1, 1.0))

        async with asyncio.timeout(BOUND_S):
            wanted = zip(prompts, counts, strict=True)
            outcomes = await asyncio.gather(*(generate(prompt, tokens) for prompt, tokens in wanted))
        causes: Counter[str] = Counter()
        for prompt, tokens, outcome in zip(prompts, counts, outcomes, strict=True):
            assert outcome.error is None, f"seed {seed}: {outcome.error!r} after {len(outcome.tokens)} of {tokens}"
            assert outcome.tokens == swarm.decoder.generate(prompt, tokens, seed, frozenset()), f"seed {seed}"
            causes.update(changed.cause for changed in outcome.routes[1:])
        assert not swarm.health._records, f"seed {seed}: a full peer is no failed one"
        assert not set(causes) - {"busy", "evicted"}, f"seed {seed}: nobody was lost: {causes}"
        await asyncio.sleep(1.0)  # for the last words; no stage lingers
        for peer in swarm.peers:
            budget = peer.service.table.budget
            assert budget.used_bytes == 0, f"seed {seed}: reserved bytes were not released"
            assert budget.kept_bytes <= budget.limit_bytes
        await swarm.settle()
        return causes

    return run_virtual(main)


def caught_within(seeds: int) -> int | None:
    """The first seed that notices, if any."""
    for seed in range(seeds):
        try:
            run_seed(seed)
        except Exception:
            return seed
    return None


@pytest.mark.slow
def test_sessions_that_grow_together_all_finish_with_the_tokens_of_a_quiet_run() -> None:
    causes: Counter[str] = Counter()
    for seed in range(SEEDS):
        causes += run_seed(seed)
    assert causes["busy"] > SEEDS, f"else this shows little: {causes}"


def test_that_nobody_gives_way_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def tell_only(self: StageTable, key: StageKey, error: SwarmError) -> None:
        self.runners[key].owner.report(error, None)

    monkeypatch.setattr(StageTable, "_give_way", tell_only)
    assert caught_within(MUTATION_SEEDS) is not None


async def pair(seed: int, positions: int) -> World:
    """Two peers with memory for so many positions each."""
    swarm = World(seed, settings=SETTINGS)
    for layers in (LayerRange(0, 3), LayerRange(3, NUM_LAYERS)):
        peer = await swarm.add_peer(layers)
        peer.service.table.budget.limit_bytes = positions * (16 * 3 + 8)
    return swarm


def test_the_session_with_the_fewest_positions_gives_way() -> None:
    async def main() -> None:
        swarm = await pair(3, 64)
        long, short = [list(range(20)), 40], [[1, 2], 40]
        longer, shorter = await asyncio.gather(swarm.generate(*long), swarm.generate(*short))
        assert [changed.cause for changed in longer.routes] == ["opened"]
        assert "busy" in [changed.cause for changed in shorter.routes]
        for (prompt, tokens), outcome in ((long, longer), (short, shorter)):
            assert outcome.tokens == swarm.decoder.generate(prompt, tokens, 3, frozenset())
        await swarm.settle()

    run_virtual(main)


def test_a_session_that_waits_for_room_holds_none_anywhere() -> None:
    async def main() -> None:
        swarm = await pair(4, 64)
        first, second = (peer.service.table for peer in swarm.peers)
        seen: list[int] = []

        async def crowd_out() -> None:
            first.budget.reserve(SessionId("another"), 0)
            (key,) = first.runners
            first._give_way(key, Busy("no room"))
            first.budget.reserve(SessionId("another"), first.budget.limit_bytes)
            await asyncio.sleep(2.0)
            seen.append(second.budget.used_bytes)
            first.budget.release(SessionId("another"))

        def at(session: Session, index: int) -> None:
            if index == 5 and not seen and first.runners:
                swarm.later(0.0, crowd_out())

        outcome = await swarm.generate([1, 2, 3], 30, at)
        assert seen == [0]
        assert [changed.cause for changed in outcome.routes] == ["opened", "busy"]
        assert outcome.tokens == swarm.decoder.generate([1, 2, 3], 30, 4, frozenset())
        await swarm.settle()

    run_virtual(main)


def test_a_session_that_gave_way_goes_to_a_peer_with_room_and_keeps_the_others() -> None:
    async def main() -> None:
        swarm = await pair(5, 64)
        first, second = (peer.service.table for peer in swarm.peers)
        spare = await swarm.add_peer(LayerRange(0, 3))
        spare.executor.layer_s = 1.0
        swarm.announce(spare)

        def at(session: Session, index: int) -> None:
            if index == 5 and session.route.hops[0].peer == swarm.peers[0].node.address:
                (key,) = first.runners
                first._give_way(key, Busy("no room"))

        outcome = await swarm.generate([1, 2, 3], 12, at)
        assert [changed.cause for changed in outcome.routes] == ["opened", "busy"]
        assert outcome.session.rebuilds[0].replayed == ((LayerRange(0, 3), 9),)
        assert outcome.tokens == swarm.decoder.generate([1, 2, 3], 12, 5, frozenset())
        assert second.executor is swarm.peers[1].executor
        await swarm.settle()

    run_virtual(main)


def test_newcomers_wait_for_those_that_gave_way() -> None:
    async def main() -> None:
        swarm = await pair(6, 64)
        table = swarm.peers[0].service.table
        until = asyncio.get_running_loop().time() + stage_table.OWED_S
        table._owed[SessionId("somebody")] = stage_table.Debt(until, end=until)
        refused = await swarm.generate([1], 3)
        assert isinstance(refused.error, Busy)
        assert "come back first" in refused.error.message
        await asyncio.sleep(stage_table.OWED_S)
        assert (await swarm.generate([1], 3)).error is None
        await swarm.settle()

    run_virtual(main)


@pytest.mark.parametrize("seed", range(4))
def test_sessions_that_come_at_once_are_not_all_refused_where_there_is_room_for_some(seed: int) -> None:
    """Each was refused by one of the peers, for the sake of another that was refused by the next."""

    async def main() -> None:
        swarm = World(seed, settings=replace(SETTINGS, peer=replace(SETTINGS.peer, max_cached_sessions=2)))
        for start in range(0, NUM_LAYERS, 2):
            await swarm.add_peer(LayerRange(start, start + 2))
        outcomes = await asyncio.gather(*(swarm.generate([number], 12) for number in range(6)))
        errors = [outcome.error for outcome in outcomes if outcome.error is not None]
        assert all(isinstance(error, Busy) and "max_cached_sessions" in error.message for error in errors)
        assert len(errors) <= 4
        await swarm.settle()

    run_virtual(main)


def test_memory_is_taken_as_tokens_come_and_promised_to_a_bound() -> None:
    async def main() -> None:
        swarm = await pair(7, 128)
        table = swarm.peers[0].service.table
        one = 16 * 3 + 8
        used: list[int] = []

        def at(session: Session, index: int) -> None:
            used.append(table.budget.used_bytes // one)

        assert (await swarm.generate([1, 2, 3], 20, at)).error is None
        assert used[0] == 4, "a block for the prompt"
        assert used == sorted(used)
        assert max(used) <= 24
        assert isinstance((await swarm.generate([1], 130)).error, Busy), "it could never be as long as it may"
        await swarm.settle()

    run_virtual(main)


def test_frames_that_a_neighbour_piles_up_end_its_own_sessions() -> None:
    """Its accomplice owned them, and what may wait for each was little: for all it was many times the budget."""

    async def main() -> None:
        swarm = World(8)
        for layers in (LayerRange(0, 3), LayerRange(3, NUM_LAYERS)):
            await swarm.add_peer(layers)
        peer, hostile = swarm.peers[1], SimTransport(swarm.network.add("hostile"))
        table, most, sessions, frames = peer.service.table, 2000, 8, 10
        table.most_waiting_bytes = most
        row = row_bytes("float32", PROFILE.hidden_size)
        controls = [await hostile.open(peer.node.address, CONTROL) for _ in range(sessions)]
        for number, control in enumerate(controls):  # their last stages wait to be told of their owner
            opening = pb.Open(session=f"{number}", epoch=1, model=PROFILE.model_id, start=3, end=NUM_LAYERS)
            opening.max_positions, opening.step_mode = 100, True
            opening.previous.append(hostile.local.peer_id)
            await control.send(pb.ControlRequest(open=opening).SerializeToString())
        await asyncio.sleep(0.1)
        link, seen = await hostile.open(peer.node.address, LINK), []

        async def pile_up() -> None:
            for sequence, number in itertools.product(range(frames), range(sessions)):
                frame = pb.Frame(session=f"{number}", epoch=1, sequence=sequence, start=10 * sequence, layer=3)
                put_rows(frame.hidden, bytes(10 * row), "float32", PROFILE.hidden_size)
                await link.send(pb.LinkMessage(frame=frame).SerializeToString())
                await asyncio.sleep(0.01)
                seen.append(sum(runner.waiting_bytes for runner in table.runners.values()))

        outcome, _ = await asyncio.gather(swarm.generate([1, 2, 3], 60), pile_up())
        assert outcome.error is None
        assert [changed.cause for changed in outcome.routes] == ["opened"]
        assert sessions * frames * 10 * row > 2 * most, "else this shows nothing"
        assert most / 2 < max(seen) <= most + row, "a token that need not wait may come to it"
        for control in controls:
            control.abort()
        await swarm.settle()

    run_virtual(main)
