"""The session on a quiet simulated network, and one accident at a time."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
from google.protobuf.message import Message

from peers.frame_router import FrameRouter
from swarm import protocol_pb2 as pb
from swarm.delegation import DelegatedSession, route_from_wire
from swarm.errors import BadRequest, Busy, Cancelled, Evicted, NoRoom, NoRoute, SwarmError, Unreachable
from swarm.protocol import decode
from swarm.sampling import SamplingParams
from swarm.session import RouteChanged, Session
from swarm.testing import SimNode, SimTransport, VirtualLoop
from swarm.transcript import MAX_TOKENS, Generated, GenerationRequest
from swarm.transport import CONTROL, DELEGATE, INFO, LINK, Stream
from swarm.types import Hop, PeerAddress, PeerId, Route, SessionId
from tests.sim import world as world_module
from tests.sim.world import PROFILE, SETTINGS, VOCAB, LayerRange, Outcome, SimPeer, ToyExecutor, World, run_virtual

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


def run(seed: int, ranges: list[LayerRange], schedule: object = None, tokens: int = 12, **extra: object) -> Outcome:
    async def main() -> Outcome:
        world = World(seed)
        for layers in ranges:
            await world.add_peer(layers)
        bound = (lambda session, index: schedule(world, session, index)) if callable(schedule) else None
        outcome = await world.generate(PROMPT, tokens, bound, **extra)
        expected = world.decoder.generate(PROMPT, tokens, seed, frozenset())
        assert outcome.error is None, outcome.error
        assert outcome.tokens == expected
        await world.settle()
        return outcome

    return run_virtual(main)


def owned(world: World, request: GenerationRequest, delegates: bool) -> Session | DelegatedSession:
    """A session that the client owns, or one of the world's peers for it; not with the world's settings."""
    transport = SimTransport(world.owner)
    if delegates:
        return DelegatedSession(transport, [peer.node.address for peer in world.peers], PROFILE, request, SETTINGS)
    return Session(transport, world.directory, PROFILE, request, SETTINGS, world.health)


def test_one_peer() -> None:
    run(1, [LayerRange(0, 6)])


def test_three_peers() -> None:
    outcome = run(2, [LayerRange(0, 2), LayerRange(2, 4), LayerRange(4, 6)])
    assert len(outcome.routes) == 1


def test_a_bug_in_what_sends_for_one_session_ends_no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    works, calls = FrameRouter.reach, itertools.count()

    async def reach(self: FrameRouter, peer: PeerAddress) -> None:
        if next(calls) == 1:
            raise ValueError("a bug")
        await works(self, peer)

    monkeypatch.setattr(FrameRouter, "reach", reach)
    outcome = run(2, [LayerRange(0, 2), *[LayerRange(2, 4)] * 2, LayerRange(4, 6)])
    assert ["see the peer's log" in changed.reason for changed in outcome.routes] == [False, True]


def test_junk_from_a_thin_client_is_refused() -> None:
    async def main() -> None:
        world = World(1)
        peer = await world.add_peer(LayerRange(0, 6))
        stream = await SimTransport(world.owner).open(peer.node.address, DELEGATE)
        await stream.send(b"junk")
        async with asyncio.timeout(5):
            reply = decode(pb.DelegateReply, await stream.receive() or b"")
        assert (reply.error.code, reply.error.message) == ("protocol", "no Delegate message")
        await world.settle()

    run_virtual(main)


def test_without_kv_cache() -> None:
    run(3, [LayerRange(0, 2), LayerRange(2, 4), LayerRange(4, 6)], no_kv_cache=True)


def test_a_killed_peer_is_replaced_at_every_position() -> None:
    for victim in range(3):

        def kill(world: World, session: Session, index: int, victim: int = victim) -> None:
            if index == 4 and not session.rebuilds:
                world.kill(world.peer_of(session, victim), forget=True)

        ranges = [LayerRange(0, 2), LayerRange(2, 4), LayerRange(4, 6)] * 2
        outcome = run(4 + victim, ranges, kill)
        assert len(outcome.session.rebuilds) == 1


def test_a_draining_peer_is_left_without_a_replay_of_others() -> None:
    def drain(world: World, session: Session, index: int) -> None:
        if index == 3:
            world.drain(world.peer_of(session, 1))

    ranges = [LayerRange(0, 2), LayerRange(2, 4), LayerRange(4, 6), LayerRange(2, 4)]
    outcome = run(8, ranges, drain, tokens=200)
    assert outcome.session.rebuilds[0].reason.endswith("is leaving")


THIRDS = [LayerRange(0, 2), LayerRange(2, 4), LayerRange(4, 6)]


def test_a_healthy_replacement_is_not_blamed_for_the_death_that_it_repairs() -> None:
    async def main() -> None:
        world = World(21)
        for layers in [*THIRDS, *THIRDS]:
            await world.add_peer(layers)
        victims: list[SimPeer] = []

        def kill(session: Session, index: int) -> None:
            if index == 4 and not victims:
                victims.append(world.peer_of(session, 1))
                world.kill(victims[0], forget=False)

        outcome = await world.generate(PROMPT, 12, kill)
        assert outcome.error is None
        dead = victims[0].node.address.peer_id
        for peer in world.peers:
            peer_id = peer.node.address.peer_id
            assert (world.health.cause(peer_id) is not None) == (peer_id == dead)

    run_virtual(main)


@pytest.mark.parametrize("told", [Unreachable("a lie"), Evicted("a lie")])
def test_who_names_one_healthy_neighbour_after_another_is_replaced(told: SwarmError) -> None:
    async def main() -> None:
        world = World(22)
        for layers in [*THIRDS, *THIRDS]:
            await world.add_peer(layers)
        liars: list[PeerId] = []

        def lie(session: Session, index: int) -> None:
            if index < 4:
                return
            liar = world.peer_of(session, 1)
            if not liars:
                liars.append(liar.node.address.peer_id)
            if liar.node.address.peer_id == liars[0]:
                [runner] = liar.service.table.runners.values()
                runner.owner.report(told, session.route.hops[2].peer.peer_id)

        outcome = await world.generate(PROMPT, 24, lie)
        assert outcome.error is None
        assert outcome.tokens == world.decoder.generate(PROMPT, 24, 22, frozenset())
        lost = [hop.peer.peer_id for rebuild in outcome.session.rebuilds for hop in rebuild.lost]
        assert len(lost) == 2
        assert lost[1] == liars[0] != lost[0]
        await world.settle()

    run_virtual(main)


@pytest.mark.parametrize("told_at_once", [True, False])
def test_who_tells_of_one_eviction_after_another_is_believed(told_at_once: bool) -> None:
    """What was evicted says so itself, only later: its line to the owner is slow, or it beats next in a second. The
    hop before it, whose frames were refused, was replaced the second time."""

    async def main() -> None:
        world = World(24)
        for layers in [*THIRDS, *THIRDS]:
            await world.add_peer(layers)
        owner = world.owner.address.peer_id
        lost: list[LayerRange] = []

        def evict(session: Session, index: int) -> None:
            if index < 4 or len(lost) == 3 or len(session.rebuilds) < len(lost):
                return
            peer = world.peer_of(session, 1)
            lost.append(peer.executor.layers)
            table, peer_id = peer.service.table, peer.node.address.peer_id
            [key] = table.runners
            if told_at_once:
                world.network.partition(owner, peer_id)
                world.later(0.1, heal(peer_id))
                table._give_way(key, Evicted("for another"))
            else:
                table.free(key)

        async def heal(peer_id: PeerId) -> None:
            world.network.heal(owner, peer_id)

        outcome = await world.generate(PROMPT, 24, evict)
        assert outcome.tokens == world.decoder.generate(PROMPT, 24, 24, frozenset())
        assert [hop.layers for rebuild in outcome.session.rebuilds for hop in rebuild.lost] == [THIRDS[1]] * 3 == lost
        assert not world.health._records
        await world.settle()

    run_virtual(main)


def test_who_tells_of_one_death_after_another_is_believed() -> None:
    async def main() -> None:
        world = World(23)
        for layers in [*THIRDS, *[THIRDS[1]] * 5]:
            await world.add_peer(layers)
        victims: list[SimPeer] = []

        def kill(session: Session, index: int) -> None:
            if index % 6 == 5 and index // 6 == len(victims):
                victims.append(world.peer_of(session, 1))
                world.kill(victims[-1], forget=True)

        outcome = await world.generate(PROMPT, 32, kill)
        assert outcome.error is None
        lost = [hop.peer for rebuild in outcome.session.rebuilds for hop in rebuild.lost]
        assert lost == [victim.node.address for victim in victims]
        assert len(lost) == 5
        await world.settle()

    run_virtual(main)


def test_without_a_replacement_the_session_waits_and_then_names_the_missing_layers(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world_module, "PROFILE", replace(PROFILE, weights="int4"))

    async def main() -> None:
        world = World(22)
        for layers in THIRDS:
            await world.add_peer(layers)

        def kill(session: Session, index: int) -> None:
            if index == 4:
                world.kill(world.peer_of(session, 1), forget=True)

        began = asyncio.get_running_loop().time()
        outcome = await world.generate(PROMPT, 12, kill)
        waited = asyncio.get_running_loop().time() - began
        assert isinstance(outcome.error, NoRoute)
        assert "2:4" in outcome.error.message
        wait_s = world.settings.recovery.wait_s
        assert wait_s <= waited < wait_s + 10
        assert len(outcome.tokens) == 5, "what was generated stays"
        assert "--weights int4 --layers 2:4, or with" in caplog.text
        await world.settle()

    run_virtual(main)


def test_a_session_goes_on_when_a_replacement_joins_while_it_waits() -> None:
    def kill(world: World, session: Session, index: int) -> None:
        if index == 4 and len(world.peers) == 3:
            world.kill(world.peer_of(session, 2), forget=True)
            world.later(12.0, world.add_peer(LayerRange(4, 6)))

    outcome = run(23, THIRDS, kill)
    assert len(outcome.session.rebuilds) == 1
    assert outcome.session.rebuilds[0].duration_s > 11


def test_a_frozen_peer_is_replaced_and_its_late_frames_change_nothing() -> None:
    def freeze(world: World, session: Session, index: int) -> None:
        if index == 4 and not session.rebuilds:
            peer = world.peer_of(session, 1)
            peer.node.freeze()
            asyncio.get_running_loop().call_later(4.0, peer.node.resume)

    outcome = run(24, [*THIRDS, LayerRange(2, 4)], freeze, tokens=150)
    assert len(outcome.session.rebuilds) == 1


def test_a_peer_that_fell_silent_is_not_asked_again_while_another_has_its_layers() -> None:
    """However often that other one has failed before: a silent peer costs ``timeouts.open_s``."""
    struck: list[SimPeer] = []

    def freeze(world: World, session: Session, index: int) -> None:
        if index != 4 or struck:
            return
        struck.append(world.peer_of(session, 1))
        struck[0].node.freeze()
        now = asyncio.get_running_loop().time()
        for peer in world.peers:
            if peer is not struck[0] and peer.executor.layers == LayerRange(2, 4):
                for _ in range(4):
                    world.health.failed(peer.node.address.peer_id, "stream_lost", now)
        asyncio.get_running_loop().call_later(30.0, struck[0].node.resume)

    outcome = run(24, [*THIRDS, LayerRange(2, 4)], freeze, tokens=30)
    (rebuild,) = outcome.session.rebuilds
    assert rebuild.duration_s < SETTINGS.timeouts.open_s / 2


def test_a_link_on_which_a_token_is_lost_is_noticed_long_before_the_step_deadline_of_a_slow_model() -> None:
    """Nothing more is sent on it, for the ring stands still; both of its ends are heard well."""

    async def main() -> None:
        world = World(3)
        for layers in (*THIRDS, THIRDS[1]):
            (await world.add_peer(layers)).executor.layer_s = 0.3
        came_at: list[float] = []

        def cut(session: Session, index: int) -> None:
            came_at.append(asyncio.get_running_loop().time())
            if len(came_at) == 10:
                world.network.partition(*(hop.peer.peer_id for hop in session.route.hops[:2]))

        outcome = await world.generate(PROMPT, 15, cut)
        assert outcome.error is None
        assert len(outcome.session.rebuilds) == 1
        assert max(after - before for before, after in itertools.pairwise(came_at)) < 10
        await world.settle()

    run_virtual(main)


def test_a_step_that_stands_still_after_a_long_prompt_is_given_as_long_as_a_step_takes() -> None:
    """And not many times as long as the prompt took, which was a step as well."""

    timeouts = replace(SETTINGS.timeouts, session_idle_s=600.0)

    async def main() -> None:
        world = World(3, settings=replace(SETTINGS, timeouts=timeouts))
        for layers in (*THIRDS, THIRDS[1]):
            (await world.add_peer(layers)).executor.layer_s = 0.3
        came_at: list[float] = []

        def stop(session: Session, index: int) -> None:
            came_at.append(asyncio.get_running_loop().time())
            if index == 0 and not session.rebuilds:
                world.later(0.0, world.peer_of(session, 1).executor.hang())

        prompt = [index % 60 for index in range(200)]
        outcome = await world.generate(prompt, 3, stop)
        assert outcome.error is None
        assert outcome.tokens == world.decoder.generate(prompt, 3, 3, frozenset())
        assert len(outcome.session.rebuilds) == 1
        prompt_s = came_at[1] - came_at[0]
        waited_s = came_at[2] - came_at[1] - prompt_s  # without the replay
        assert waited_s < timeouts.step_slow_factor * timeouts.step_floor_s + 5 < prompt_s
        await world.settle()

    run_virtual(main)


def test_a_hop_that_says_it_gets_on_and_never_does_is_given_up() -> None:
    async def main() -> None:
        world = World(3, settings=replace(SETTINGS, timeouts=replace(SETTINGS.timeouts, session_idle_s=1e6)))
        for layers in (*THIRDS, THIRDS[1]):
            await world.add_peer(layers)
        world.settings = SETTINGS  # the owner's

        async def pretend(executor: ToyExecutor) -> None:
            while True:
                await asyncio.sleep(0.5)
                executor.passes += 1

        def stop(session: Session, index: int) -> None:
            if index == 4 and not session.rebuilds:
                executor = world.peer_of(session, 1).executor
                world.later(0.0, executor.hang())
                world.later(0.0, pretend(executor))

        async with asyncio.timeout(2 * SETTINGS.timeouts.session_idle_s):
            outcome = await world.generate(PROMPT, 12, stop)
        assert outcome.error is None
        assert outcome.tokens == world.decoder.generate(PROMPT, 12, 3, frozenset())
        assert len(outcome.session.rebuilds) == 1
        await world.settle()

    run_virtual(main)


def test_a_peer_is_given_the_time_for_a_prompt_that_follows_from_what_it_announced() -> None:
    layer_s, timeouts = 15.0, replace(SETTINGS.timeouts, session_idle_s=600.0)
    assert 3 * layer_s > timeouts.step_slow_factor * timeouts.step_floor_s, "else this shows nothing"

    async def main() -> None:
        world = World(3, settings=replace(SETTINGS, timeouts=timeouts))
        for layers in THIRDS:
            peer = await world.add_peer(layers)
            peer.executor.layer_s = layer_s
            world.announce(peer)
        outcome = await world.generate([1, 2, 3, 4], 1)
        assert outcome.error is None
        assert outcome.session.rebuilds == []
        await world.settle()

    run_virtual(main)


def test_a_session_that_ends_while_it_is_mended_waits_for_none_of_those_that_it_dials() -> None:
    """One replacement was reached and lost its network, another one does not answer the dial."""

    async def main() -> None:
        world = World(24)
        for layers in THIRDS:
            await world.add_peer(layers)
        owner, lost = world.owner.address.peer_id, asyncio.Event()

        def lose_two(session: Session, index: int) -> None:
            if index == 2:
                world.network.partition(owner, world.peers[4].node.address.peer_id)
                for peer in (world.peers[0], world.peers[2]):
                    world.kill(peer, forget=True)
                lost.set()

        generating = asyncio.create_task(world.generate(PROMPT, 50, lose_two))
        await asyncio.sleep(0.01)
        for layers in (THIRDS[0], THIRDS[2]):
            await world.add_peer(layers)
        await lost.wait()
        await asyncio.sleep(0.3)
        world.network.partition(owner, world.peers[3].node.address.peer_id)
        generating.cancel()
        done, _ = await asyncio.wait((generating,), timeout=1.0)
        assert done
        await world.settle()

    run_virtual(main)


@pytest.mark.parametrize("turns", range(4))
def test_a_session_that_is_cancelled_twice_at_once_leaves_nothing(turns: int) -> None:
    async def main() -> None:
        world = World(17)
        for layers in THIRDS:
            await world.add_peer(layers)
        before, begun = asyncio.all_tasks(), asyncio.Event()

        def schedule(session: Session, index: int) -> None:
            if index == 5:
                begun.set()

        generation = asyncio.create_task(world.generate(PROMPT, 200, schedule))
        await begun.wait()
        generation.cancel()
        for _ in range(turns):
            await asyncio.sleep(0)
        generation.cancel()
        await asyncio.wait((generation,))
        await world.settle()
        assert asyncio.all_tasks() <= before

    run_virtual(main)


@pytest.mark.parametrize("waits", [False, True])
def test_a_session_ends_at_once_when_its_process_leaves_the_swarm(monkeypatch: pytest.MonkeyPatch, waits: bool) -> None:
    """Instead of looking for other peers, and for somebody to blame."""

    async def left(self: SimTransport) -> int:
        raise Cancelled("this process has left the swarm")

    async def main() -> None:
        world = World(18)
        for layers in THIRDS:
            await world.add_peer(layers)

        def leave() -> None:
            monkeypatch.setattr(SimTransport, "ready", left)
            world.owner.break_streams()

        def schedule(session: Session, index: int) -> None:
            if index == 5 and waits:
                world.kill(world.peer_of(session, 1), forget=True)
                asyncio.get_running_loop().call_later(5, leave)
            elif index == 5:
                leave()

        began = asyncio.get_running_loop().time()
        outcome = await world.generate(PROMPT, 200, schedule)
        assert isinstance(outcome.error, Cancelled)
        assert asyncio.get_running_loop().time() - began < 10
        assert waits or not world.health._records
        await world.settle()

    run_virtual(main)


def test_losing_all_hops_but_one() -> None:
    def kill(world: World, session: Session, index: int) -> None:
        if index == 4 and not session.rebuilds:
            for position in (0, 1):
                world.kill(world.peer_of(session, position), forget=True)

    outcome = run(25, [*THIRDS, *THIRDS], kill)
    assert sorted(str(layers) for layers, _ in outcome.session.rebuilds[0].replayed) == ["0:2", "2:4"]


def test_a_rebuild_tells_of_all_that_was_computed_again_however_many_attempts_it_took() -> None:
    async def main() -> None:
        world = World(25)
        for layers in THIRDS:
            await world.add_peer(layers)

        async def lose_two() -> None:
            for peer in world.peers[1:]:
                world.kill(peer, forget=True)
            for layers in [*THIRDS[1:], THIRDS[2]]:
                await world.add_peer(layers)
            full = world.peers[-1]
            full.executor.layer_s = 1e-6  # everybody's first choice
            world.announce(full)
            full.service.table.budget.reserve(SessionId("another"), full.service.table.budget.free_bytes)

        def at(session: Session, index: int) -> None:
            if index == 4 and not session.rebuilds:
                world.later(0.0, lose_two())

        outcome = await world.generate(PROMPT, 12, at)
        assert outcome.error is None
        [rebuild] = outcome.session.rebuilds
        assert rebuild.replayed == tuple((layers, rebuild.kept) for layers in THIRDS[1:])

    run_virtual(main)


def test_a_neighbour_that_also_holds_the_lost_layers_takes_them() -> None:
    def kill(world: World, session: Session, index: int) -> None:
        if index == 4 and not session.rebuilds:
            world.kill(world.peers[1], forget=True)

    outcome = run(26, [LayerRange(0, 2), LayerRange(2, 6), LayerRange(0, 4), LayerRange(4, 6)], kill)
    assert outcome.session.finish_reason == "length"


def test_without_checkpoints_upstream_computes_again_and_the_tokens_are_the_same() -> None:
    settings = replace(SETTINGS, peer=replace(SETTINGS.peer, checkpoints=False))

    async def main() -> None:
        world = World(27, settings=settings)
        for layers in [*THIRDS, *THIRDS]:
            await world.add_peer(layers)

        def kill(session: Session, index: int) -> None:
            if index == 4 and not session.rebuilds:
                world.kill(world.peer_of(session, 2), forget=True)

        outcome = await world.generate(PROMPT, 12, kill)
        assert outcome.error is None
        assert outcome.tokens == world.decoder.generate(PROMPT, 12, 27, frozenset())

    run_virtual(main)


def test_the_death_of_the_owners_own_daemon_blames_nobody_and_recomputes_nothing() -> None:
    def restart(world: World, session: Session, index: int) -> None:
        if index == 4 and not session.rebuilds:
            world.owner.restart_daemon()

    outcome = run(28, [*THIRDS, *THIRDS], restart)
    assert outcome.session.rebuilds[0].replayed == tuple((layers, 0) for layers in THIRDS)


def test_a_stage_with_a_long_step_to_end_is_there_for_its_owner_who_is_back() -> None:
    async def restart(world: World) -> None:
        world.owner.restart_daemon()

    def slow(world: World, session: Session, index: int) -> None:
        world.peer_of(session, 1).executor.layer_s = 3.0
        if index == 4 and not session.rebuilds:
            world.later(0.5, restart(world))

    timeouts = SETTINGS.timeouts
    assert timeouts.owner_grace_s < 3.0 * 2 - 0.5 < timeouts.open_s, "else this shows nothing"
    outcome = run(28, THIRDS, slow, tokens=7)
    assert max(positions for _, positions in outcome.session.rebuilds[0].replayed) <= 1, "the newest was on its way"


class SurprisedTransport(SimTransport):
    """Of a process whose network daemon has just died, which the first dials show."""

    async def open(self, peer: PeerAddress, protocol: str) -> Stream:
        if not self.node.generation:
            await asyncio.sleep(0.05)
            self.node.generation = 1
            raise Unreachable("the own p2p daemon is down")
        return await super().open(peer, protocol)


def test_a_session_that_begins_as_the_own_daemon_dies_has_its_route() -> None:
    """It would take all peers for lost, and say that nobody serves the layers."""

    async def main() -> None:
        world = World(44)
        for layers in THIRDS:
            await world.add_peer(layers)
        request = GenerationRequest(tuple(PROMPT), 8, SamplingParams(seed=44), frozenset())
        transport = SurprisedTransport(world.owner)
        async with Session(transport, world.directory, PROFILE, request, world.settings, world.health) as session:
            tokens = [event.token_id async for event in session.events() if isinstance(event, Generated)]
        assert tokens == world.decoder.generate(PROMPT, 8, 44, frozenset())
        assert not any(world.health.cause(peer.node.address.peer_id) for peer in world.peers), "nobody is blamed"
        await world.settle()

    run_virtual(main)


def test_a_full_peer_says_busy_and_another_takes_the_session() -> None:
    async def main() -> None:
        world = World(29)
        for layers in [*THIRDS, LayerRange(2, 4)]:
            await world.add_peer(layers)
        full = world.peers[1]
        full.service.table.budget.reserve(SessionId("another"), full.service.table.budget.free_bytes)
        outcome = await world.generate(PROMPT, 12)
        assert outcome.error is None
        assert full.node.address.peer_id not in [hop.peer.peer_id for hop in outcome.routes[0].route.hops]

    run_virtual(main)


def test_refused_by_everybody_says_the_limit() -> None:
    async def main() -> None:
        world = World(30)
        for layers in THIRDS:
            await world.add_peer(layers)
        full = world.peers[1]
        full.service.table.budget.reserve(SessionId("another"), full.service.table.budget.free_bytes)
        outcome = await world.generate(PROMPT, 12)
        assert isinstance(outcome.error, Busy)
        assert "KV budget" in outcome.error.message
        await asyncio.sleep(30)
        assert all(not peer.service.table.runners for peer in world.peers), "the others were opened and are freed"

    run_virtual(main)


def test_a_new_session_asks_peers_that_announced_no_room_while_another_had_it() -> None:
    """The last turn of the same chat, for example: announcements are seconds old."""

    async def main() -> None:
        world = World(31)
        for layers in THIRDS:
            peer = (await world.add_peer(layers)).node.address.peer_id
            world.directory.known[peer] = replace(world.directory.known[peer], kv_tokens_free=0)
        outcome = await world.generate(PROMPT, 12)
        assert outcome.error is None
        assert outcome.tokens == world.decoder.generate(PROMPT, 12, 31, frozenset())
        await world.settle()

    run_virtual(main)


def test_a_session_that_is_too_long_for_everybody_says_so_and_not_that_layers_are_missing() -> None:
    async def main() -> None:
        world = World(24)
        for layers in THIRDS:
            added = await world.add_peer(layers)
            peer, budget = added.node.address.peer_id, added.service.table.budget
            budget.limit_bytes = 12 * budget.limit_bytes // added.service.table.kv_tokens_free()
            world.directory.known[peer] = replace(world.directory.known[peer], kv_tokens_free=12)
        outcome = await world.generate(PROMPT, 400)
        assert isinstance(outcome.error, NoRoom)
        assert outcome.error.exit_code == Busy.exit_code
        assert "12 tokens are free, 411 are needed" in outcome.error.message
        await world.settle()

    run_virtual(main)


def test_a_new_session_whose_stage_gives_way_before_it_has_a_route_is_told_of_the_limit() -> None:
    """The peer said why, and then that the stage is gone: that was taken for the reason."""

    async def main() -> None:
        world = World(30)
        for layers in THIRDS:
            await world.add_peer(layers)
        first, last = world.peers[0], world.peers[2]
        world.network.bytes_per_s[world.owner.address.peer_id, last.node.address.peer_id] = 80.0
        table = first.service.table

        async def crowd_out() -> None:
            [key] = table.runners
            table._give_way(key, Busy("KV budget: no room"))

        world.later(0.1, crowd_out())
        outcome = await world.generate(PROMPT, 12)
        assert isinstance(outcome.error, Busy)
        await world.settle()

    run_virtual(main)


@pytest.mark.parametrize("accident", ["killed", "frozen", "full"])
def test_a_new_session_looks_once_more_before_it_ends_because_those_that_it_knew_fail(accident: str) -> None:
    """The view is seconds old: who came for a peer that was lost is not in it yet."""

    async def main() -> None:
        world = World(54)
        for layers in [*THIRDS, LayerRange(2, 4)]:
            await world.add_peer(layers)
        failing, newcomer = world.peers[1], world.peers[3]
        table = failing.service.table
        if accident == "killed":
            world.kill(failing, forget=False)
        elif accident == "frozen":
            failing.node.freeze()
        else:
            table.budget.reserve(SessionId("another"), table.budget.free_bytes)
        news = world.directory.known.pop(newcomer.node.address.peer_id)

        async def refresh() -> None:
            await asyncio.sleep(0.01)
            world.directory.known[news.peer.peer_id] = news

        world.directory.refresh = refresh  # type: ignore[method-assign]
        outcome = await world.generate(PROMPT, 12)
        assert outcome.error is None
        assert outcome.tokens == world.decoder.generate(PROMPT, 12, 54, frozenset())
        assert outcome.session.route.hops[1].peer == newcomer.node.address
        if accident == "full":
            table.budget.release(SessionId("another"))
        await world.settle()

    run_virtual(main)


def test_two_that_freeze_at_once_are_replaced_as_soon_as_one() -> None:
    """Were the second one asked to go on in the new epoch first, its silence would be waited for once more."""

    def longest_gap_s(frozen: int) -> float:
        times: list[float] = []

        def freeze(world: World, session: Session, index: int) -> None:
            times.append(asyncio.get_running_loop().time())
            if index == 4 and not session.rebuilds:
                for position in range(frozen):
                    world.peer_of(session, position).node.freeze()

        outcome = run(51, [*THIRDS, *THIRDS], freeze)
        assert [len(rebuild.lost) for rebuild in outcome.session.rebuilds] == [frozen]
        return max(after - before for before, after in itertools.pairwise(times))

    assert longest_gap_s(2) == pytest.approx(longest_gap_s(1), abs=0.5)


def test_a_peer_that_froze_unnoticed_is_given_up_by_a_new_session_after_the_heartbeats_that_it_owes() -> None:
    async def main() -> None:
        world = World(52)
        for layers in [*THIRDS, *THIRDS]:
            await world.add_peer(layers)
        for peer in world.peers[:3]:
            peer.node.freeze()
        for peer in world.peers[3:]:
            peer.executor.layer_s = 2 * max(frozen.executor.layer_s for frozen in world.peers[:3])
            world.announce(peer)
        began = asyncio.get_running_loop().time()
        outcome = await world.generate(PROMPT, 1)
        assert outcome.error is None
        timeouts = SETTINGS.timeouts
        silence_s = timeouts.heartbeat_s * timeouts.heartbeat_misses
        assert silence_s <= asyncio.get_running_loop().time() - began < silence_s + 1
        await world.settle()

    run_virtual(main)


def test_a_survivor_with_a_long_step_to_end_is_not_taken_for_frozen_when_it_is_opened_anew() -> None:
    def kill(world: World, session: Session, index: int) -> None:
        survivor = world.peer_of(session, 1)
        survivor.executor.layer_s = 3.0  # a step takes longer than the silence that loses a peer
        if index == 4 and not session.rebuilds:
            world.later(0.5, kill_first(world, session))

    async def kill_first(world: World, session: Session) -> None:
        world.kill(world.peer_of(session, 0), forget=True)

    outcome = run(53, [*THIRDS, LayerRange(0, 2)], kill, tokens=7)
    assert [hop.layers for rebuild in outcome.session.rebuilds for hop in rebuild.lost] == [LayerRange(0, 2)]


@pytest.mark.parametrize("hangs", [False, True])
def test_a_survivor_in_a_pass_as_long_as_it_announced_is_not_lost_with_another_hop(hangs: bool) -> None:
    """What it had of the prompt was computed again, by nobody where it alone has these layers."""
    layer_s, timeouts = 6.0, replace(SETTINGS.timeouts, session_idle_s=600.0)
    settings = replace(SETTINGS, engine=replace(SETTINGS.engine, max_batch_tokens=8), timeouts=timeouts)
    assert len(THIRDS[0]) * layer_s > timeouts.open_s + 1.0, "else this shows nothing"

    async def main() -> None:
        world = World(3, settings=settings)
        for layers in THIRDS:
            peer = await world.add_peer(layers)
            peer.executor.layer_s = layer_s
            world.announce(peer)
        first, _, last = world.peers
        first.executor.layer_s = 100 * layer_s if hangs else layer_s
        generation = asyncio.create_task(world.generate([1, 2, 3, 4], 1))
        await asyncio.sleep(1.0)
        assert first.service.table.runners
        world.kill(last, forget=True)
        for layers in THIRDS[2:] + THIRDS[:1] * hangs:
            await world.add_peer(layers)
        outcome = await generation
        assert outcome.error is None
        assert outcome.tokens == world.decoder.generate([1, 2, 3, 4], 1, 3, frozenset())
        lost = [hop.layers for rebuild in outcome.session.rebuilds for hop in rebuild.lost]
        assert lost == [THIRDS[2], *THIRDS[:1] * hangs]
        await world.settle()

    run_virtual(main)


@pytest.mark.parametrize("delegates", [False, True])
def test_peers_that_beat_more_rarely_than_their_owner_expects_are_not_taken_for_lost(delegates: bool) -> None:
    """Everybody has settings of their own."""

    async def main() -> None:
        world = World(54, settings=replace(SETTINGS, timeouts=replace(SETTINGS.timeouts, heartbeat_s=4.0)))
        for layers in THIRDS:
            peer = await world.add_peer(layers)
            peer.executor.layer_s = 0.5  # the prompt takes longer than the silence that loses a peer
        request = GenerationRequest(tuple(PROMPT), 3, SamplingParams(seed=54), frozenset())
        async with owned(world, request, delegates) as session:
            events = [event async for event in session.events()]
        assert [type(event) for event in events] == [RouteChanged, *[Generated] * 3]
        await world.settle()

    run_virtual(main)


def test_a_thin_client_whose_owner_dies_goes_on_through_another_after_its_committed_tokens() -> None:
    async def main() -> None:
        world = World(31)
        for layers in [*THIRDS, *THIRDS]:
            await world.add_peer(layers)
        owners = [world.peers[0], world.peers[4]]
        request = GenerationRequest(tuple(PROMPT), 20, SamplingParams(seed=31), frozenset())
        via = [peer.node.address for peer in owners]
        session = DelegatedSession(SimTransport(world.owner), via, PROFILE, request, world.settings)
        tokens: list[int] = []
        async with session:
            async for event in session.events():
                if isinstance(event, Generated):
                    assert event.index == len(tokens)
                    tokens.append(event.token_id)
                    if len(tokens) == 7:
                        world.kill(owners[0], forget=True)
        assert tokens == world.decoder.generate(PROMPT, 20, 31, frozenset())
        assert session.finish_reason == "length"
        await world.settle()

    run_virtual(main)


@pytest.mark.parametrize("delegates", [False, True])
@pytest.mark.parametrize("stops", [4, 40])
def test_who_stands_still_for_a_while_blames_nobody(delegates: bool, stops: int) -> None:
    """A process that is stopped, a laptop that is suspended: what was said meanwhile waits to be heard."""

    async def main() -> None:
        world = World(35)
        for layers in [*THIRDS, *THIRDS]:
            await world.add_peer(layers)
        request = GenerationRequest(tuple(PROMPT), 60, SamplingParams(seed=35), frozenset())
        tokens: list[int] = []
        routes: list[RouteChanged] = []

        async def stop() -> None:
            for _ in range(stops):
                await asyncio.sleep(0.02)
                loop = asyncio.get_running_loop()
                assert isinstance(loop, VirtualLoop)
                loop.stand_still(8.0)

        async with owned(world, request, delegates) as session:
            async for event in session.events():
                if isinstance(event, Generated):
                    tokens.append(event.token_id)
                    if len(tokens) == 7:
                        world.later(0.0, stop())
                else:
                    routes.append(event)
        assert tokens == world.decoder.generate(PROMPT, 60, 35, frozenset())
        assert [change.reason for change in routes] == ["opened"]
        assert not world.health._records
        await world.settle()

    run_virtual(main)


@pytest.mark.parametrize(
    ("protocol", "first_words"),
    [
        (CONTROL, pb.ControlRequest(open=pb.Open(session="s", model=PROFILE.model_id, end=6, max_positions=8))),
        (INFO, pb.InfoRequest(describe=True)),
        (DELEGATE, pb.Delegate(model=PROFILE.model_id, prompt=[1], max_tokens=1)),
        (LINK, pb.LinkMessage(ping=1)),
    ],
)
def test_first_words_that_waited_while_a_peer_stood_still_are_answered(protocol: str, first_words: Message) -> None:
    """It took its own standstill for the caller's silence, and dropped whoever had called just before."""

    async def main() -> None:
        world = World(1)
        peer = await world.add_peer(LayerRange(0, 6))
        stream = await SimTransport(world.owner).open(peer.node.address, protocol)
        await asyncio.sleep(0)  # the peer waits for what is on its way now
        await stream.send(first_words.SerializeToString())
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.stand_still(2 * world.settings.timeouts.link_idle_s + 1)
        assert await stream.receive() is not None
        stream.abort()
        await world.settle()

    run_virtual(main)


@pytest.mark.parametrize("after_s", [0.0, 0.003, 0.01])
def test_a_session_within_a_machine_that_was_suspended_for_long_has_its_route_still(after_s: float) -> None:
    """Its owner and its peers wake up together: their links had been silent for as long, their stages idle."""

    async def main() -> None:
        world = World(37)
        for layers in [*THIRDS, *THIRDS]:
            await world.add_peer(layers)
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)

        def suspend(session: Session, index: int) -> None:
            if index == 4:
                loop.call_later(after_s, loop.stand_still, 3600.0)

        outcome = await world.generate(PROMPT, 12, suspend)
        assert outcome.tokens == world.decoder.generate(PROMPT, 12, 37, frozenset())
        assert [change.reason for change in outcome.routes] == ["opened"]
        await world.settle()

    run_virtual(main)


@pytest.mark.parametrize("delegates", [False, True])
def test_who_stands_still_while_a_route_is_opened_has_one_then(delegates: bool) -> None:
    """Peers give up who dials and then says nothing for long, and who stood still would have given them up. A new
    session was told that nobody serves these layers."""

    async def main(stops_after_s: float) -> None:
        world = World(36)
        for layers in THIRDS:
            await world.add_peer(layers)
        request = GenerationRequest(tuple(PROMPT), 4, SamplingParams(seed=36), frozenset())
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.call_later(stops_after_s, loop.stand_still, 12.0)
        async with owned(world, request, delegates) as session:
            tokens = [event.token_id async for event in session.events() if isinstance(event, Generated)]
        assert tokens == world.decoder.generate(PROMPT, 4, 36, frozenset())
        await world.settle()

    for step in range(40):
        run_virtual(functools.partial(main, step / 2000))


def test_a_thin_client_is_told_what_each_rebuild_cost() -> None:
    async def main() -> None:
        world = World(32)
        for layers in [*THIRDS, *THIRDS]:
            await world.add_peer(layers)
        peers = {peer.node.address.peer_id: peer for peer in world.peers}
        request = GenerationRequest(tuple(PROMPT), 20, SamplingParams(seed=32), frozenset())
        routes: list[Route] = []
        lost: list[Hop] = []
        async with DelegatedSession(
            SimTransport(world.owner), [world.peers[0].node.address], PROFILE, request, world.settings
        ) as session:
            async for event in session.events():
                if isinstance(event, RouteChanged):
                    routes.append(event.route)
                elif event.index in (6, 12):
                    lost.append(routes[-1].hops[event.index // 6])
                    world.kill(peers[lost[-1].peer.peer_id], forget=True)
        assert [list(rebuild.lost) for rebuild in session.rebuilds] == [[hop] for hop in lost]
        for rebuild, hop, index in zip(session.rebuilds, lost, (7, 13), strict=True):
            assert rebuild.token_index >= index
            assert rebuild.kept == len(PROMPT) + rebuild.token_index
            assert rebuild.replayed == ((hop.layers, rebuild.kept),)
            assert 0 < rebuild.duration_s < 10
            assert "lost" in rebuild.reason

    run_virtual(main)


class RestartingTransport(SimTransport):
    """Of a process whose network daemon takes ``pause_s`` to come back."""

    pause_s = 4.0

    def __init__(self, node: SimNode) -> None:
        super().__init__(node)
        self._up_at = 0.0

    def restart(self) -> None:
        self.node.restart_daemon()
        self._up_at = asyncio.get_running_loop().time() + self.pause_s

    async def ready(self) -> int:
        await asyncio.sleep(self._up_at - asyncio.get_running_loop().time())
        return await super().ready()

    async def open(self, peer: PeerAddress, protocol: str) -> Stream:
        if asyncio.get_running_loop().time() < self._up_at:
            raise Unreachable("the own p2p daemon is down; it is being restarted")
        return await super().open(peer, protocol)


def delegated(seed: int, via: list[int], accidents: dict[int, Callable[[World, SimTransport], None]]) -> float:
    """``accidents`` by the number of tokens that are there; ``via`` are indices of peers. The longest gap."""

    async def main() -> float:
        world = World(seed)
        for layers in [*THIRDS, *THIRDS]:
            await world.add_peer(layers)
        request = GenerationRequest(tuple(PROMPT), 20, SamplingParams(seed=seed), frozenset())
        transport = RestartingTransport(world.owner)
        owners = [world.peers[index].node.address for index in via]
        now, tokens, times = asyncio.get_running_loop().time, [], []
        async with DelegatedSession(transport, owners, PROFILE, request, world.settings) as session:
            async for event in session.events():
                if isinstance(event, Generated):
                    assert event.index == len(tokens)
                    tokens.append(event.token_id)
                    times.append(now())
                    if len(tokens) in accidents:
                        accidents[len(tokens)](world, transport)
        assert tokens == world.decoder.generate(PROMPT, 20, seed, frozenset())
        await world.settle()
        return max(after - before for before, after in itertools.pairwise(times))

    return run_virtual(main)


def test_a_thin_client_asks_the_next_owner_each_time_that_one_is_lost() -> None:
    """Not the lost one again: a frozen peer takes its time to show that it does not answer."""

    def freeze(index: int) -> Callable[[World, SimTransport], None]:
        return lambda world, _: world.peers[index].node.freeze()

    timeouts = SETTINGS.timeouts
    silence_s = timeouts.heartbeat_s * timeouts.heartbeat_misses
    # the next owner may have to notice by itself that a hop is frozen, which takes it as long
    assert delegated(37, [0, 4, 2], {5: freeze(0), 12: freeze(4)}) < 2 * silence_s + 1


def test_a_thin_client_waits_for_its_own_daemon_before_it_asks_another_owner() -> None:
    def restart(_: World, transport: SimTransport) -> None:
        assert isinstance(transport, RestartingTransport)
        transport.restart()

    gap_s = delegated(38, [0], {7: restart})
    assert RestartingTransport.pause_s <= gap_s < RestartingTransport.pause_s + 1


def test_a_thin_client_whose_only_owner_is_away_for_seconds_goes_on_when_it_is_back() -> None:
    def restart(world: World, _: SimTransport) -> None:
        node = world.peers[0].node
        handlers, node.handlers = node.handlers, {}
        node.restart_daemon()

        async def come_back() -> None:
            node.handlers = handlers

        world.later(8.0, come_back())

    assert 8.0 <= delegated(39, [0], {7: restart}) < 10.0


def test_a_thin_client_whose_owner_went_together_with_layers_waits_for_those() -> None:
    """As a session does that has its owner still: the next one begins anew, and would give up at once."""

    def lose(world: World, _: SimTransport) -> None:
        for index in (0, 3):
            world.kill(world.peers[index], forget=True)
        world.later(8.0, world.add_peer(THIRDS[0]))

    assert 8.0 <= delegated(43, [0, 4], {7: lose}) < 10.0


def test_a_thin_client_whose_only_owner_is_gone_says_so_after_the_wait_for_a_replacement() -> None:
    """One that never began has nothing to lose, and says so soon."""

    async def main() -> None:
        world = World(40)
        for layers in THIRDS:
            await world.add_peer(layers)
        now, owner = asyncio.get_running_loop().time, world.peers[0]
        request = GenerationRequest(tuple(PROMPT), 20, SamplingParams(seed=40), frozenset())

        async def error_after_s() -> float:
            last_at = now()
            session = DelegatedSession(
                SimTransport(world.owner), [owner.node.address], PROFILE, request, world.settings
            )
            with contextlib.suppress(Unreachable):
                async with session:
                    async for event in session.events():
                        last_at = now()
                        if isinstance(event, Generated) and event.index == 5:
                            world.kill(owner, forget=True)
                pytest.fail("nobody owned the session, and it ended well")
            return now() - last_at

        assert SETTINGS.recovery.wait_s <= await error_after_s() < SETTINGS.recovery.wait_s + 2
        assert await error_after_s() < 2
        await world.settle()

    run_virtual(main)


@pytest.mark.parametrize("leaving", [True, False])
def test_a_peer_that_leaves_ends_what_it_owns_for_thin_clients_and_takes_no_more(leaving: bool) -> None:
    """At one that only goes on with other layers they have nothing to wait for."""

    async def main() -> None:
        world = World(41)
        for layers in [*THIRDS, *THIRDS]:
            await world.add_peer(layers)
        owner, other = world.peers[0], world.peers[4]
        expected = world.decoder.generate(PROMPT, 80, 41, frozenset())

        async def delegate(*via: SimPeer, at_token: Callable[[int], None] = lambda index: None) -> None:
            request = GenerationRequest(tuple(PROMPT), 80, SamplingParams(seed=41), frozenset())
            addresses = [peer.node.address for peer in via]
            session = DelegatedSession(SimTransport(world.owner), addresses, PROFILE, request, world.settings)
            async with session:
                tokens = []
                async for event in session.events():
                    if isinstance(event, Generated):
                        tokens.append(event.token_id)
                        at_token(event.index)
            assert tokens == expected

        started: list[asyncio.Task[None]] = []

        def leave(index: int) -> None:
            if index == 5:
                world.drain(owner)
                started.append(asyncio.create_task(owner.service.drained(leaving=leaving)))
            if index == 10:  # another thin client, which knows another owner or gets on without
                started.append(asyncio.create_task(delegate(owner, *([other] if leaving else []))))
            if index == 60:
                assert started[0].done() is not leaving

        await delegate(owner, at_token=leave)
        await asyncio.gather(*started)
        if leaving:
            with pytest.raises(Busy, match="leaving"):
                await delegate(owner)
        await world.settle()

    run_virtual(main)


def test_a_thin_client_knows_that_a_token_is_the_last_one_that_there_is_room_for() -> None:
    """Else it holds back what may still become a stop text, for ever."""

    async def main() -> None:
        world = World(33)
        peer = await world.add_peer(LayerRange(0, 6))
        request = GenerationRequest(tuple(PROMPT), 2 * PROFILE.max_positions, SamplingParams(), frozenset())
        transport = SimTransport(world.owner)
        session = DelegatedSession(transport, [peer.node.address], PROFILE, request, world.settings)
        async with session:
            reasons = [session.finish_reason async for event in session.events() if isinstance(event, Generated)]
        assert reasons == [None] * (PROFILE.max_positions - len(PROMPT) - 1) + ["length"]
        await world.settle()

    run_virtual(main)


def test_a_thin_client_may_ask_for_far_more_tokens_than_there_is_room_for() -> None:
    async def main() -> None:
        world = World(35)
        peer = await world.add_peer(LayerRange(0, 6))
        request = GenerationRequest(tuple(PROMPT), MAX_TOKENS, SamplingParams(), frozenset())
        session = DelegatedSession(SimTransport(world.owner), [peer.node.address], PROFILE, request, world.settings)
        async with session:
            tokens = [event async for event in session.events() if isinstance(event, Generated)]
        assert len(PROMPT) + len(tokens) == PROFILE.max_positions
        await world.settle()

    run_virtual(main)


@pytest.mark.parametrize("token_id", [-1, VOCAB, 2**33])
def test_tokens_outside_the_vocabulary_are_a_bad_request_before_anybody_is_asked(token_id: int) -> None:
    world = World(36)
    transport, owner = SimTransport(world.owner), world.owner.address
    request = GenerationRequest((1, token_id), 5, SamplingParams(), frozenset())
    with pytest.raises(BadRequest, match=f"token {token_id} is not in the vocabulary"):
        Session(transport, world.directory, PROFILE, request, world.settings, world.health)
    with pytest.raises(BadRequest, match=f"token {token_id} is not in the vocabulary"):
        DelegatedSession(transport, [owner], PROFILE, request, world.settings)


def test_a_thin_client_that_goes_away_frees_every_stage() -> None:
    async def main() -> None:
        world = World(32)
        for layers in THIRDS:
            await world.add_peer(layers)
        request = GenerationRequest(tuple(PROMPT), 20, SamplingParams(seed=32), frozenset())
        session = DelegatedSession(
            SimTransport(world.owner), [world.peers[1].node.address], PROFILE, request, world.settings
        )
        async with session, contextlib.aclosing(session.events()) as events:
            async for event in events:
                if isinstance(event, Generated) and event.index == 3:
                    break
        await asyncio.sleep(2.0)
        assert all(not peer.service.table.runners for peer in world.peers)
        await world.settle()

    run_virtual(main)


def test_a_peer_owns_no_more_sessions_of_thin_clients_than_its_limit_however_they_come() -> None:
    """All streams were open before the first of them asked."""

    async def main() -> None:
        world = World(34)
        peer = await world.add_peer(LayerRange(0, 6))
        limit = world.settings.limits.max_delegated
        transport, address = SimTransport(world.owner), peer.node.address
        silent = [await transport.open(address, DELEGATE) for _ in range(limit)]
        asking = [await transport.open(address, DELEGATE) for _ in range(3 * limit)]
        message = pb.Delegate(model=PROFILE.model_id, prompt=PROMPT, max_tokens=50).SerializeToString()
        for stream in asking:
            await stream.send(message)
        first = [decode(pb.DelegateReply, await stream.receive() or b"") for stream in asking]
        refused = [reply.error.code for reply in first if reply.HasField("error")]
        assert refused == ["busy"] * 2 * limit
        for stream in (*silent, *asking):
            stream.abort()
        await world.settle()

    run_virtual(main)


def test_any_peer_plans_when_asked_and_leaves_out_whom_it_is_told() -> None:
    async def main() -> None:
        world = World(33)
        for layers in [*THIRDS, *THIRDS]:
            await world.add_peer(layers)

        async def planned(*exclude: str) -> pb.InfoReply:
            stream = await SimTransport(world.owner).open(world.peers[1].node.address, INFO)
            request = pb.InfoRequest(plan=pb.PlanRequest(tokens=20, exclude=exclude))
            await stream.send(request.SerializeToString())
            return decode(pb.InfoReply, await stream.receive() or b"")

        hops = route_from_wire((await planned()).plan).route.hops
        assert [hop.layers for hop in hops] == list(THIRDS)
        tired = hops[0].peer.peer_id
        another = route_from_wire((await planned(tired)).plan).route.hops
        assert tired not in [hop.peer.peer_id for hop in another]
        refused = await planned(*(peer.node.address.peer_id for peer in (world.peers[0], world.peers[3])))
        assert refused.error.code == "no_route"
        assert "0:2" in refused.error.message

    run_virtual(main)
