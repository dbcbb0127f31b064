"""Successors of a leaving peer that fail, and leaving peers that are lost while successors warm."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from peers.runner import StageRunner
from swarm.chain import Chain
from swarm.config import EngineSettings
from swarm.control import HopControl, HopLost
from swarm.errors import NoRoute
from swarm.rebuilds import Patience
from swarm.session import Session
from swarm.testing import Faults, VirtualLoop, run_virtual
from swarm.types import LayerRange
from tests.sim.world import SETTINGS, Outcome, SimPeer, World

FIRST, SECOND = LayerRange(0, 3), LayerRange(3, 6)
TOKENS = 150


@pytest.mark.parametrize("how", ["it dies", "the hop before can't reach it"])
def test_a_successor_that_fails_is_no_fault_of_the_hop_before_it(how: str) -> None:
    async def scenario() -> None:
        world = World(3)
        before, leaving = await world.add_peer(FIRST), await world.add_peer(SECOND)
        first_id = before.node.address.peer_id
        others = [await world.add_peer(layers) for layers in (FIRST, SECOND)]
        for other in others:
            del world.directory.known[other.node.address.peer_id]
        spare, successor = others
        successor_id = successor.node.address.peer_id
        killed = asyncio.Event()

        def schedule(session: Session, index: int) -> None:
            if index == 20:
                world.announce(spare)
                world.announce(successor)
                world.drain(leaving)
                if how != "it dies":
                    world.network.partition(first_id, successor_id)
            targets = [target.peer.peer_id for target in session._chain.controls[0].targets]
            if how == "it dies" and successor_id in targets and not killed.is_set():
                killed.set()
                world.kill(successor, forget=False)

        outcome = await world.generate([1, 2, 3], TOKENS, schedule)
        assert outcome.error is None
        assert outcome.tokens == world.decoder.generate([1, 2, 3], TOKENS, 3, frozenset())
        assert how != "it dies" or killed.is_set()
        assert all(route.route.hops[0].peer.peer_id == first_id for route in outcome.routes)
        assert first_id not in world.health._records
        assert successor_id in world.health._records

    run_virtual(scenario)


def test_a_successor_that_is_slower_than_the_old_route_catches_up() -> None:
    """It got more frames of single tokens than may wait there, was given up and blamed, again and again."""

    async def scenario() -> None:
        world = World(3, settings=replace(SETTINGS, engine=EngineSettings()))
        for layers in (FIRST, SECOND):
            (await world.add_peer(layers)).executor.layer_s = 0.001
        successor = await world.add_peer(SECOND)
        del world.directory.known[successor.node.address.peer_id]
        successor.executor.layer_s = 0.02  # a token takes longer than the route does, many at once don't

        def schedule(session: Session, index: int) -> None:
            if index == 20:
                world.announce(successor)
                world.drain(world.peers[1])
            if index >= 20 and len(session.route.hops) == 2:
                assert successor.node.address.peer_id not in world.health._records

        outcome = await world.generate([1, 2, 3], 400, schedule)
        assert outcome.error is None
        assert outcome.tokens == world.decoder.generate([1, 2, 3], 400, 3, frozenset())
        assert [change.cause for change in outcome.routes] == ["opened", "leaving"]

    run_virtual(scenario)


def test_who_stands_still_while_a_successor_warms_up_does_not_blame_it() -> None:
    async def scenario() -> None:
        world = World(3)
        for layers in (FIRST, SECOND):
            await world.add_peer(layers)
        successor = await world.add_peer(SECOND)
        del world.directory.known[successor.node.address.peer_id]
        successor.executor.layer_s = 0.02
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        stopped = asyncio.Event()

        def schedule(session: Session, index: int) -> None:
            if index == 20:
                world.announce(successor)
                world.drain(world.peers[1])
            assert successor.node.address.peer_id not in world.health._records
            if successor.service.table.runners and not stopped.is_set():
                stopped.set()
                successor.node.freeze()  # what it says comes after that
                loop.call_later(0.2, loop.stand_still, 8.0)
                loop.call_later(8.5, successor.node.resume)

        outcome = await world.generate([1, 2, 3], TOKENS, schedule)
        assert outcome.error is None
        assert outcome.tokens == world.decoder.generate([1, 2, 3], TOKENS, 3, frozenset())
        assert stopped.is_set()
        assert [change.cause for change in outcome.routes] == ["opened", "leaving"]
        assert not world.health._records

    run_virtual(scenario)


def test_of_two_successors_one_that_the_other_can_not_reach_is_replaced() -> None:
    """Nobody listened to those that are not on the route yet: the leaving peer was left when it was gone."""

    async def scenario() -> None:
        world = World(3)
        for layers in (LayerRange(0, 2), LayerRange(2, 6)):
            await world.add_peer(layers)

        async def add_successors() -> None:
            successors = [await world.add_peer(layers) for layers in (LayerRange(2, 4), LayerRange(4, 6))]
            world.network.partition(*(peer.node.address.peer_id for peer in successors))
            world.drain(world.peers[1])
            await asyncio.sleep(2.0)
            await world.add_peer(LayerRange(4, 6))

        def schedule(session: Session, index: int) -> None:
            if index == 20:
                world.later(0.0, add_successors())

        outcome = await world.generate([1, 2, 3], TOKENS, schedule)
        assert outcome.error is None
        assert outcome.tokens == world.decoder.generate([1, 2, 3], TOKENS, 3, frozenset())
        assert [route.cause for route in outcome.routes] == ["opened", "leaving"]

    run_virtual(scenario)


def test_a_leaving_peer_may_be_lost_while_a_rebuild_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    async def pause(self: Patience) -> None:
        await asyncio.sleep(0.1)  # what the third loss in a row brings

    async def scenario() -> None:
        world = World(3, faults=Faults(latency_s=(0.02, 0.03)))
        for layers in (FIRST, SECOND, SECOND):
            await world.add_peer(layers)
        prepare = Chain.prepare_handover
        leaving: list[SimPeer] = []

        def prepare_and_lose(self: Chain, hop: HopControl, token_s: float) -> None:
            begins = hop not in self._handovers
            prepare(self, hop, token_s)
            if begins:
                world.kill(leaving[0], forget=True)

        def schedule(session: Session, index: int) -> None:
            if index == 20:
                leaving.append(world.peer_of(session, 1))
                world.drain(leaving[0])

        monkeypatch.setattr(Chain, "prepare_handover", prepare_and_lose)
        monkeypatch.setattr(Patience, "pause", pause)
        outcome = await world.generate([1, 2, 3], 60, schedule)
        assert [route.cause for route in outcome.routes][1:] == ["stream_lost"]
        assert outcome.error is None
        assert outcome.tokens == world.decoder.generate([1, 2, 3], 60, 3, frozenset())

    run_virtual(scenario)


def test_a_handover_asks_nothing_of_a_route_that_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a rebuild pauses, the hop before the leaving one may be gone; the one before that has nothing to send to a
    successor, and was lost if it was told to."""

    async def pause(self: Patience) -> None:
        await asyncio.sleep(0.3)  # what the third loss in a row brings

    async def scenario() -> None:
        world = World(3, faults=Faults(latency_s=(0.02, 0.03)))
        for layers in (LayerRange(0, 2), *2 * (LayerRange(2, 4), LayerRange(4, 6))):
            await world.add_peer(layers)
        prepare, bury = Chain.prepare_handover, Chain.bury
        reasons: list[str] = []

        def prepare_and_lose(self: Chain, hop: HopControl, token_s: float) -> None:
            begins = hop not in self._handovers
            prepare(self, hop, token_s)
            if begins and not reasons:
                world.network.nodes[self.hops[1].peer.peer_id].kill()

        async def bury_and_note(self: Chain, loss: HopLost) -> str:
            reasons.append(await bury(self, loss))
            return reasons[-1]

        def schedule(session: Session, index: int) -> None:
            if index == 20:
                world.drain(world.peer_of(session, 2))

        monkeypatch.setattr(Chain, "prepare_handover", prepare_and_lose)
        monkeypatch.setattr(Chain, "bury", bury_and_note)
        monkeypatch.setattr(Patience, "pause", pause)
        outcome = await world.generate([1, 2, 3], 60, schedule)
        assert outcome.error is None
        assert outcome.tokens == world.decoder.generate([1, 2, 3], 60, 3, frozenset())
        assert [reason.partition(":")[2] for reason in reasons] == ["4]: the connection broke"]
        assert outcome.routes[-1].cause == "leaving"

    run_virtual(scenario)


def test_a_peer_that_answers_with_an_error_of_ours_is_a_successor_once_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that there is no route, which only a planner can say."""

    async def scenario() -> None:
        world = World(3)
        for layers in (FIRST, SECOND, SECOND):
            await world.add_peer(layers)

        def refuse(*_: object) -> StageRunner:
            raise NoRoute("nobody serves layers 3:6")

        most = 0

        def schedule(session: Session, index: int) -> None:
            nonlocal most
            if index == 20:
                leaving = world.peer_of(session, 1)
                liar = next(peer for peer in world.peers[1:] if peer is not leaving)
                monkeypatch.setattr(liar.service.table, "admit", refuse)
                world.drain(leaving)
            warming = [control for handover, _ in session._chain._handovers.values() for control in handover.fresh]
            most = max(most, len(warming))

        outcome = await world.generate([1, 2, 3], 4 * TOKENS, schedule)
        assert outcome.error is None or outcome.error.code == "no_route"
        assert most == 1

    run_virtual(scenario)


@pytest.mark.parametrize("position", [0, 1])
def test_successors_that_others_use_too_are_taken_though_they_never_have_the_newest_position(position: int) -> None:
    """They run the rows of all, one step after another: each comes a little later than at the peer that leaves."""

    async def scenario() -> None:
        world = World(43)
        for layers in (FIRST, SECOND, FIRST, SECOND):
            await world.add_peer(layers)
        for peer in world.peers:
            peer.executor.layer_s = 0.005
        others: list[asyncio.Task[Outcome]] = []

        def schedule(session: Session, index: int) -> None:
            if index == 20:
                world.drain(world.peer_of(session, position))
                others.extend(asyncio.create_task(world.generate([4, 5], TOKENS)) for _ in range(3))

        outcome = await world.generate([1, 2, 3], TOKENS, schedule, speculate=False)
        assert outcome.error is None
        assert outcome.tokens == world.decoder.generate([1, 2, 3], TOKENS, 43, frozenset())
        assert [route.cause for route in outcome.routes] == ["opened", "leaving"]
        assert outcome.session.rebuilds[0].token_index < 50
        await asyncio.gather(*others)

    run_virtual(scenario)
