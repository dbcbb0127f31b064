"""What comes and goes on links, from strangers above all; virtual time."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import cast

import pytest

from peers.frame_router import FrameRouter
from peers.stage import Stage, Target
from peers.stage_table import StageTable
from swarm import protocol_pb2 as pb
from swarm.errors import Gap, StreamLost
from swarm.protocol import decode, put_rows, timing_to_wire
from swarm.sampling import SamplingParams
from swarm.testing import SimTransport, run_virtual
from swarm.transport import CONTROL, LINK
from swarm.types import HopTiming, LayerRange, PeerAddress, PeerId
from swarm.wire import MODEL
from tests.sim.world import PROFILE, SETTINGS, SimPeer, World


class Deaf:
    """A link of somebody who sends a frame ``times`` times and takes ``room`` replies."""

    remote_address = ""

    def __init__(self, frame: bytes, times: int, room: int) -> None:
        self.remote = PeerId("stranger")
        self.taken: list[bytes] = []
        self._frames, self._room = [frame] * times, room
        self.aborted = False

    async def send(self, frame: bytes) -> None:
        if not self.try_send(frame):
            await asyncio.Event().wait()

    def try_send(self, frame: bytes) -> bool:
        if len(self.taken) == self._room:
            return False
        self.taken.append(frame)
        return True

    async def receive(self) -> bytes | None:
        if self.aborted:
            raise StreamLost("aborted here")
        return self._frames.pop() if self._frames else None

    async def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        self.aborted = True


async def alone() -> tuple[World, SimPeer]:
    world = World(1)
    return world, await world.add_peer(LayerRange(0, 6))


def test_a_stranger_who_takes_no_replies_loses_his_link() -> None:
    """Replies waited for him, each in a task of its own, until there was no memory."""

    async def main() -> None:
        _, peer = await alone()
        frame = pb.LinkMessage(frame=pb.Frame(session="none of ours" * 100, layer=3))
        link = Deaf(frame.SerializeToString(), times=1000, room=20)
        tasks = len(asyncio.all_tasks())
        await peer.node.handlers[LINK](link)
        assert len(asyncio.all_tasks()) == tasks
        assert link.aborted
        refusals = [decode(pb.LinkMessage, taken).refusal for taken in link.taken]
        assert {refusal.error.code for refusal in refusals} == {"evicted"}
        assert {len(refusal.session) for refusal in refusals} == {64}

    run_virtual(main)


def test_a_link_that_is_opened_while_a_peer_moves_does_not_outlast_that() -> None:
    """The handlers of the old range stand until the new one has its own. A link that came meanwhile was answered there
    for ever after, and each frame on it refused."""

    async def main() -> None:
        world, peer = await alone()
        peer.life.cancel()
        await asyncio.gather(peer.life, return_exceptions=True)
        stranger = SimTransport(world.network.add("other"))
        link = await stranger.open(peer.node.address, LINK)
        await link.send(pb.LinkMessage(ping=1).SerializeToString())
        with pytest.raises(StreamLost):
            await link.receive()

    run_virtual(main)


def test_of_two_links_of_one_peer_the_older_one_ends() -> None:
    async def main() -> None:
        world, peer = await alone()
        other = SimTransport(world.network.add("other"))
        first, second = [await other.open(peer.node.address, LINK) for _ in range(2)]
        with pytest.raises(StreamLost):
            await first.receive()
        await second.send(pb.LinkMessage(ping=7).SerializeToString())
        answer = await second.receive()
        assert answer is not None
        assert decode(pb.LinkMessage, answer).pong == 7

    run_virtual(main)


def test_a_silent_link_is_closed_and_one_that_is_used_stays() -> None:
    async def main() -> None:
        world, peer = await alone()
        idle_s = world.settings.timeouts.link_idle_s
        nodes = world.network.add("other"), world.owner
        silent, used = [await SimTransport(node).open(peer.node.address, LINK) for node in nodes]
        for number in range(1, 11):
            await asyncio.sleep(idle_s)
            await used.send(pb.LinkMessage(ping=number).SerializeToString())
            reply = decode(pb.LinkMessage, await used.receive() or b"")
            assert reply.pong == number
        async with asyncio.timeout(1):
            assert await silent.receive() is None, "a clean end: no session takes it for a loss"
        await used.close()

    run_virtual(main)


def test_only_whom_a_stage_sends_to_may_refuse_its_frames() -> None:
    """Any peer with a link from here that knew the session could have its owner rebuild the route."""

    async def main() -> None:
        _, peer = await alone()
        told: list[PeerId | None] = []
        runner = SimpleNamespace(
            stage=SimpleNamespace(epoch=1, targets=[Target(PeerAddress(PeerId("next")), 3, 1, 0)]),
            owner=SimpleNamespace(report=lambda error, blamed: told.append(blamed)),
        )
        table = SimpleNamespace(settings=SETTINGS, of_session=lambda session: [runner])
        async with asyncio.TaskGroup() as tasks:
            router = FrameRouter(SimTransport(peer.node), cast(StageTable, table), tasks)
            refusal = pb.LinkMessage(refusal=pb.Refusal(session="s", epoch=1, error=pb.Error(code="evicted")))
            for sender in ("stranger", "next"):
                router._on_reply(PeerId(sender), refusal)
        assert told == ["next"]

    run_virtual(main)


def test_an_owner_who_takes_his_time_is_told_one_error_of_an_epoch() -> None:
    async def main() -> None:
        world, peer = await alone()
        stream = await SimTransport(world.owner).open(peer.node.address, CONTROL)
        opening = pb.Open(
            session="s",
            epoch=1,
            model=PROFILE.model_id,
            end=6,
            max_positions=8,
            sampling=SamplingParams(temperature=0).to_wire(),
            token_ids=[1],
        )
        await stream.send(pb.ControlRequest(open=opening).SerializeToString())
        await stream.receive()
        (runner,) = peer.service.table.runners.values()
        told: list[pb.Error] = []
        listening = asyncio.Event()

        async def slow(reply: pb.ControlReply) -> None:
            await listening.wait()
            told.append(reply.error)

        runner.owner.stream = slow
        tasks = len(asyncio.all_tasks())
        for _ in range(100):
            runner.owner.report(Gap("one"), None)
        runner.stage.epoch = 2
        for _ in range(100):
            runner.owner.report(Gap("two"), None)
        assert len(asyncio.all_tasks()) == tasks + 2
        listening.set()
        await asyncio.sleep(0.1)
        runner.owner.report(Gap("three"), None)
        await asyncio.sleep(0.1)
        assert [(error.epoch, error.message) for error in told] == [(1, "one"), (2, "two"), (2, "three")]
        stream.abort()

    run_virtual(main)


def test_a_neighbour_tells_of_no_more_hops_than_there_are_layers_before_a_stage() -> None:
    """What it told was kept with the newest rows, four megabytes a session."""

    async def main() -> None:
        world, peer = await alone()
        stage = SimpleNamespace(
            first=False, layers=LayerRange(2, 6), input_wire=MODEL, max_positions=8, step_mode=False
        )
        timing = timing_to_wire(HopTiming(PeerId("peer"), LayerRange(0, 1), 0.001, 0.002, 4, 0.5))
        frame = pb.Frame(hops=[timing] * 100)
        put_rows(frame.hidden, bytes(8), "float32", PROFILE.hidden_size)
        work = peer.service._router._to_work(cast(Stage, stage), PeerId("neighbour"), frame)
        assert work.hops == [timing] * 2
        await world.settle()

    run_virtual(main)
