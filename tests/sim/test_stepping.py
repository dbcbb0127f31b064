"""Step mode under seeded faults: whatever the owner asks for, in any order, the logits are those of a quiet run."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest

from swarm import protocol_pb2 as pb
from swarm.errors import BadRequest, Busy, Cancelled, Evicted, NoRoute, SwarmError, TooLong
from swarm.stepping import StepSession
from swarm.testing import SimTransport, ToyCache
from tests.sim.world import NUM_LAYERS, PROFILE, SETTINGS, Faults, LayerRange, World, run_virtual

THIRDS = [LayerRange(0, 2), LayerRange(2, 4), LayerRange(4, 6)]
CAPACITY = 64


def states_after(world: World, cut: int, tokens: list[int], answer_from: int) -> list[int]:
    """Hidden states behind so many layers, by one decoder that nothing happens to."""
    layers = LayerRange(0, cut)
    return world.decoder.run(layers, ToyCache(layers, len(tokens)), 0, tokens)[answer_from:]


def session_of(world: World, capacity: int = CAPACITY) -> StepSession:
    return StepSession(SimTransport(world.owner), world.directory, PROFILE, capacity, world.settings, world.health)


async def swarm_of(seed: int, ranges: list[LayerRange], faults: Faults | None = None) -> World:
    world = World(seed, faults or Faults())
    for layers in ranges:
        await world.add_peer(layers)
    return world


async def check(world: World, session: StepSession, tokens: list[int], answer_from: int, hidden: bool = False) -> None:
    rebuilds = len(session.rebuilds)
    answer = await session.run(tokens, answer_from, hidden=hidden)
    assert answer.start == answer_from
    assert answer.logits == world.decoder.logits(states_after(world, NUM_LAYERS, tokens, answer_from))
    chain = session._chain
    steady = chain is not None and chain.complete and len(session.rebuilds) == rebuilds
    if hidden and not steady:  # the route may have been cut anew since they were told
        assert NUM_LAYERS in answer.hidden
    else:
        assert list(answer.hidden) == ([hop.layers.end for hop in session.route.hops] if hidden else [])
    for cut, rows in answer.hidden.items():
        assert rows == b"".join(state.to_bytes(8, "big") for state in states_after(world, cut, tokens, answer_from))


def test_logits_of_any_rows_and_only_what_differs_is_computed() -> None:
    async def main() -> None:
        world = await swarm_of(1, THIRDS)
        async with session_of(world) as session:
            tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5]
            await check(world, session, tokens, 8)
            assert session.computed == 9
            await check(world, session, [*tokens, 7], 9)
            assert session.computed == 10
            await check(world, session, [*tokens, 8], 9)  # another token in its place
            assert session.computed == 11
            await check(world, session, [*tokens[:4], 2, 2, 2], 4, hidden=True)
            assert session.computed == 14
            await check(world, session, [*tokens[:4], 2, 2, 2], 0)  # all rows, whatever is there
            assert session.rebuilds == []
        await world.settle()

    run_virtual(main)


@pytest.mark.parametrize("ranges", [THIRDS, [LayerRange(0, 6)]], ids=["three peers", "one"])
def test_a_hop_beats_however_often_it_is_asked(ranges: list[LayerRange]) -> None:
    """An input more often than once a heartbeat put it off each time: the first hop was lost every three seconds."""

    async def main() -> None:
        world = await swarm_of(3, ranges)
        for peer in world.peers:
            peer.executor.layer_s = 0.1
        async with session_of(world) as session:
            for length in range(1, 20):
                await check(world, session, [7] * length, length - 1)
            assert session.rebuilds == []
            assert asyncio.get_running_loop().time() > 3 * SETTINGS.timeouts.heartbeat_s * 3
        await world.settle()

    run_virtual(main)


def test_one_peer_with_all_layers_answers_too() -> None:
    async def main() -> None:
        world = await swarm_of(2, [LayerRange(0, 6)])
        async with session_of(world) as session:
            await check(world, session, [5, 4, 3], 1, hidden=True)
            await check(world, session, [5, 4, 2, 1], 3)
        await world.settle()

    run_virtual(main)


def test_rows_that_reach_the_last_hop_before_it_was_told_to_answer_are_answered() -> None:
    """Its owner may be further away than the hop before it."""

    async def main() -> None:
        for leaving in (False, True):
            world = await swarm_of(1, THIRDS * (1 + leaving))
            async with session_of(world) as session:
                for peer in world.peers:
                    peer.executor.layer_s = 0.0001
                for last in world.peers[2::3]:
                    world.network.bytes_per_s[world.owner.address.peer_id, last.node.address.peer_id] = 80.0
                await check(world, session, [3, 1, 4, 1, 5], 2)
                if leaving:
                    world.drain(world.peer_of(session, 2))
                    await asyncio.sleep(10)
                await check(world, session, [3, 1, 4, 1, 5, 9], 5)
                assert [rebuild.reason[-10:] for rebuild in session.rebuilds] == ["is leaving"] * leaving
            await world.settle()

    run_virtual(main)


def test_answers_that_take_long_to_arrive_are_waited_for() -> None:
    """Logits of many rows over the owner's narrow line, and hidden states: heartbeats come behind them."""

    async def main() -> None:
        world = await swarm_of(1, [*THIRDS, *THIRDS])
        for peer in world.peers:
            world.network.bytes_per_s[peer.node.address.peer_id, world.owner.address.peer_id] = 250.0
        async with session_of(world) as session:
            await check(world, session, list(range(40)), 0, hidden=True)
            await check(world, session, list(range(50)), 3, hidden=True)
            assert session.rebuilds == []
        await world.settle()

    run_virtual(main)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_kill_between_and_within_steps_is_not_seen(victim: int) -> None:
    async def main() -> None:
        world = await swarm_of(3 + victim, THIRDS * 3)
        async with session_of(world) as session:
            tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5]
            await check(world, session, tokens, 8)
            world.kill(world.peer_of(session, victim), forget=True)
            await check(world, session, [*tokens, 1], 9)
            world.later(0.004, kill_soon(world, session, victim))
            await check(world, session, [*tokens[:5], *tokens], 5)
            await check(world, session, [*tokens[:5], *tokens, 4], 14)
            assert len(session.rebuilds) == 2
        await world.settle()

    run_virtual(main)


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_an_input_that_goes_back_while_a_new_peer_replays_reaches_all_hops(seed: int, victim: int) -> None:
    async def main() -> None:
        for delay_s in (0.02, 0.07, 0.12, 0.17, 0.3):
            world = await swarm_of(seed, THIRDS * 2, Faults(latency_s=(0.02, 0.05)))
            async with session_of(world) as session:
                tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5]
                await check(world, session, tokens, 8)
                world.kill(world.peer_of(session, victim), forget=True)
                await asyncio.sleep(delay_s)
                # past the end of what the survivors have, of which they have to forget a part
                await check(world, session, [*tokens[:4], *[7] * 8], 11)
                assert len(session.rebuilds) == 1
            await world.settle()

    run_virtual(main)


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("delay_s", [0.001, 0.02, 0.05, 0.08])
def test_hidden_states_at_the_cuts_survive_a_kill(victim: int, delay_s: float) -> None:
    async def main() -> None:
        world = await swarm_of(20 + victim, THIRDS * 2)
        async with session_of(world) as session:
            tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5]
            await check(world, session, tokens, 8, hidden=True)
            world.later(delay_s, kill_soon(world, session, victim))
            await check(world, session, [*tokens, 7, 7], 3, hidden=True)
            await asyncio.sleep(1)
            await check(world, session, [*tokens, 7, 8], 3, hidden=True)
            assert len(session.rebuilds) == 1
        await world.settle()

    run_virtual(main)


@pytest.mark.parametrize("error", [Busy("no room"), Evicted("idle")])
def test_hidden_states_at_the_cuts_survive_a_hop_that_gives_way(error: SwarmError) -> None:
    """It is replaced; its last words were taken for an answer, and the caller got them."""

    async def main() -> None:
        world = await swarm_of(20, THIRDS * 2)
        async with session_of(world) as session:
            tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5]
            await check(world, session, tokens, 8)
            table = world.peer_of(session, 1).service.table
            [(key, runner)] = table.runners.items()

            def gone(request: pb.Fetch) -> pb.Fetched:
                table._give_way(key, error)
                raise Evicted("this stage is gone")

            runner.fetch = gone  # type: ignore[method-assign]
            await check(world, session, [*tokens, 7], 9, hidden=True)
            assert len(session.rebuilds) == 1
        await world.settle()

    run_virtual(main)


def test_without_checkpoints_there_are_no_hidden_states_at_the_cuts() -> None:
    async def main() -> None:
        settings = replace(SETTINGS, peer=replace(SETTINGS.peer, checkpoints=False))
        world = World(4, settings=settings)
        for layers in THIRDS:
            await world.add_peer(layers)
        async with session_of(world) as session:
            await check(world, session, [3, 1, 4], 2)
            with pytest.raises(BadRequest, match="keeps no checkpoints"):
                await session.run([3, 1, 4, 5], 3, hidden=True)
            await check(world, session, [3, 1, 4, 6], 3)
        await world.settle()

    run_virtual(main)


async def kill_soon(world: World, session: StepSession, victim: int) -> None:
    world.kill(world.peer_of(session, victim), forget=True)


def test_an_idle_session_is_mended_before_it_is_asked() -> None:
    async def main() -> None:
        world = await swarm_of(7, THIRDS * 2)
        async with session_of(world) as session:
            await check(world, session, [1, 2, 3], 2)
            world.kill(world.peer_of(session, 1), forget=True)
            await asyncio.sleep(5)
            assert len(session.rebuilds) == 1
            await asyncio.sleep(600)  # the peers free what is idle for so long, and nobody opens it again
            assert len(session.rebuilds) == 1
            assert all(not peer.service.table.runners for peer in world.peers)
            await check(world, session, [1, 2, 3, 4], 3)
            assert len(session.rebuilds) == 2
        await world.settle()

    run_virtual(main)


def test_a_peer_that_leaves_is_replaced_while_the_session_is_idle() -> None:
    async def main() -> None:
        for leaving in range(3):
            world = await swarm_of(8 + leaving, THIRDS * 2)
            async with session_of(world) as session:
                await check(world, session, [1, 2, 3, 4, 5, 6, 7], 6)
                peer = world.peer_of(session, leaving)
                world.drain(peer)
                await asyncio.sleep(10)
                assert peer.node.address not in [hop.peer for hop in session.route.hops]
                assert [rebuild.reason[-10:] for rebuild in session.rebuilds] == ["is leaving"]
                await check(world, session, [1, 2, 3, 4, 5, 6, 7, 8], 7)
                await check(world, session, [1, 2, 3, 9], 3)
            await world.settle()

    run_virtual(main)


def test_a_step_that_was_given_up_leaves_nothing_behind() -> None:
    async def main() -> None:
        world = await swarm_of(12, THIRDS * 2)
        async with session_of(world) as session:
            await check(world, session, [1, 2, 3, 4], 3)
            for delay_s in (0.0, 0.001, 0.003, 0.01, 0.02):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(delay_s):
                        await session.run([1, 2, 9, 9, 9, 9], 2)
                await check(world, session, [1, 2, 3, 4, 5], 4)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await session.run([1, 7, 7, 7, 7, 7], 2)
            world.kill(world.peer_of(session, 2), forget=True)
            await check(world, session, [1, 7, 3, 4, 5], 4)
        await world.settle()

    run_virtual(main)


@pytest.mark.parametrize("then", [[1, 2, 7, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 9]])
def test_a_step_that_is_given_up_while_the_hops_are_told_to_go_back_costs_no_hop(then: list[int]) -> None:
    """They are told in a new epoch, which takes as long as the passes that are under way."""

    async def main() -> None:
        world = await swarm_of(12, THIRDS)
        async with session_of(world) as session:
            for tokens, patience_s in (([*range(1, 41)], 0.05), ([1, 2, 3, 4, 5, 6, 7, 8], 0.004), ([1, 2, 3], 0.004)):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(patience_s):
                        await session.run(tokens, len(tokens) - 1)
            await check(world, session, then, len(then) - 1)
            assert session.rebuilds == []
        await world.settle()

    run_virtual(main)


def test_inputs_that_are_given_up_one_after_another_do_not_pile_up_at_a_slow_hop() -> None:
    """Their rows were together more than the session has positions, which nobody honest sends, and the hop was lost."""

    async def main() -> None:
        world = await swarm_of(12, THIRDS)
        async with session_of(world) as session:
            await check(world, session, [1, 2, 3, 4], 3)
            for peer in world.peers:
                peer.executor.layer_s = 0.1
            for number in range(5):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.01):
                        await session.run([1, 2, *[number] * 40], 41)
            await check(world, session, [1, 2, 9, 9], 3)
            assert session.rebuilds == []
        await world.settle()

    run_virtual(main)


@pytest.mark.parametrize("turns", range(4))
def test_a_session_that_is_closed_twice_at_once_leaves_no_stage(turns: int) -> None:
    async def main() -> None:
        world = await swarm_of(16, THIRDS)
        session = await session_of(world).__aenter__()
        await check(world, session, [1, 2, 3], 2)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(session.close())
            for _ in range(turns):
                await asyncio.sleep(0)
            tasks.create_task(session.close())
        await world.settle()

    run_virtual(main)


def test_wrong_inputs_are_refused_and_the_session_goes_on() -> None:
    async def main() -> None:
        world = await swarm_of(13, THIRDS)
        with pytest.raises(TooLong):
            session_of(world, 10**6)
        async with session_of(world, 8) as session:
            for tokens, answer_from in (([1, 2], 2), ([], 0), ([1, PROFILE.vocab_size], 0), ([1, -1], 0)):
                with pytest.raises(BadRequest):
                    await session.run(tokens, answer_from)
            with pytest.raises(TooLong):
                await session.run([1] * 9, 8)
            await check(world, session, [1, 2, 3], 0)
        await world.settle()

    run_virtual(main)


def test_there_is_a_route_while_the_session_has_one() -> None:
    async def main() -> None:
        world = await swarm_of(14, THIRDS)
        async with session_of(world) as session:
            assert session.route is None
            await check(world, session, [1, 2, 3], 0)
            assert [hop.layers for hop in session.route.hops] == THIRDS
            world.kill(world.peer_of(session, 1), forget=True)
            await asyncio.sleep(1)
            assert session.route is None
        await world.settle()

    run_virtual(main)


def test_without_a_replacement_the_session_ends_and_says_why() -> None:
    async def main() -> None:
        world = await swarm_of(14, THIRDS)
        async with session_of(world) as session:
            await check(world, session, [1, 2, 3], 2)
            world.kill(world.peer_of(session, 1), forget=True)
            with pytest.raises(NoRoute, match="2:4"):
                await session.run([1, 2, 3, 4], 3)
            assert isinstance(session.error, NoRoute)
        await world.settle()
        world = await swarm_of(15, THIRDS)
        session = session_of(world)
        async with session:
            asking = asyncio.create_task(session.run([1, 2, 3], 0))
            await asyncio.sleep(0.001)
        with pytest.raises(Cancelled):
            await asking
        await world.settle()

    run_virtual(main)


FAULTS = ("kill", "freeze", "daemon", "drain")


async def disturbed(seed: int) -> int:
    """A random walk over sequences, with accidents; the number of rebuilds."""
    rng = random.Random(seed)
    faults = Faults(slow=0.02, duplicate=rng.choice([0.0, 0.05]), reorder=0.0)
    world = await swarm_of(seed, [*THIRDS * 3, LayerRange(0, 4), LayerRange(2, 6), LayerRange(0, 6)], faults)

    async def strike(session: StepSession, kind: str, index: int) -> None:
        if session.route is None:
            return
        peer = world.peer_of(session, index)
        if kind == "kill":
            world.kill(peer, forget=rng.random() < 0.5)
        elif kind == "freeze":
            peer.node.freeze()
            asyncio.get_running_loop().call_later(6.0, peer.node.resume)
        elif kind == "daemon":
            rng.choice([world.owner, peer.node]).restart_daemon()
        else:
            world.drain(peer)

    async with session_of(world) as session:
        tokens = [rng.randrange(PROFILE.vocab_size) for _ in range(rng.randint(1, 12))]
        strikes = set(rng.sample(range(40), 3))
        for number in range(40):
            if number in strikes:
                world.later(rng.uniform(0.0, 0.08), strike(session, rng.choice(FAULTS), rng.randrange(6)))
            if rng.random() < 0.3:
                del tokens[rng.randint(1, len(tokens)) :]
            tokens += [rng.randrange(PROFILE.vocab_size) for _ in range(rng.choice([1, 1, 1, 2, 5]))]
            tokens = tokens[: CAPACITY - 1]
            answer_from = rng.choice([len(tokens) - 1] * 3 + [rng.randrange(len(tokens))])
            if rng.random() < 0.1:
                try:
                    async with asyncio.timeout(rng.uniform(0.0, 0.1)):
                        await check(world, session, tokens, answer_from)
                except TimeoutError:
                    continue
            await check(world, session, tokens, answer_from, hidden=rng.random() < 0.2)
            if rng.random() < 0.1:
                await asyncio.sleep(rng.uniform(0.0, 3.0))
        rebuilds = len(session.rebuilds)
    await world.settle()
    return rebuilds


def test_no_seed_changes_a_number() -> None:
    total = 0
    for seed in range(40):
        try:
            total += run_virtual(lambda seed=seed: disturbed(seed))
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
    assert total > 40, "the faults must have been felt"
