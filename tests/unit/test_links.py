"""Outgoing links; virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from peers.links import Links, _Link
from swarm import protocol_pb2 as pb
from swarm.config import Settings
from swarm.errors import ProtocolError, StreamLost, SwarmError, Unreachable
from swarm.protocol import decode
from swarm.testing import Faults, SimNetwork, SimNode, SimTransport, run_virtual
from swarm.transport import LINK, Stream
from swarm.types import PeerAddress, PeerId


def test_dials_that_fail_leave_nothing_and_those_at_once_open_one_link() -> None:
    async def main() -> None:
        network = SimNetwork(random.Random(1), Faults())
        own, remote = network.add("own"), network.add("remote")
        opened: list[Stream] = []

        async def handle(stream: Stream) -> None:
            opened.append(stream)
            await stream.receive()

        async with asyncio.TaskGroup() as tasks:
            links = Links(SimTransport(own), tasks, Settings().timeouts, lambda *_: None, lambda *_: None)
            for number in range(20):
                with pytest.raises(Unreachable):
                    await links.reach(PeerAddress(PeerId(f"nobody{number}")))
            assert not links._dialling
            # the first of these fails, those that waited for it dial again, and one that comes later joins them
            early = [asyncio.create_task(links.reach(remote.address)) for _ in range(3)]
            await asyncio.wait(early, return_when=asyncio.FIRST_COMPLETED)
            await SimTransport(remote).serve(LINK, handle)
            early.append(asyncio.create_task(links.reach(remote.address)))
            results = await asyncio.gather(*early, return_exceptions=True)
            assert [type(result) for result in results] == [Unreachable, *[type(None)] * 3]
            await asyncio.sleep(0.1)
            assert len(opened) == 1
            del early, results
            assert not links._dialling
            await links.aclose()

    run_virtual(main)


@pytest.mark.parametrize("error", [StreamLost("it took nothing"), ProtocolError("too large a frame")])
def test_a_link_that_a_frame_breaks_is_lost_to_all_who_use_it(error: SwarmError) -> None:
    """What they have sent on it may not have left; a frame that is refused here breaks nothing."""

    async def main() -> None:
        network = SimNetwork(random.Random(1), Faults())
        own, remote = network.add("own"), network.add("remote")

        async def handle(stream: Stream) -> None:
            with contextlib.suppress(StreamLost):
                while await stream.receive() is not None:
                    pass

        await SimTransport(remote).serve(LINK, handle)
        lost: list[tuple[PeerId, SwarmError]] = []
        async with asyncio.TaskGroup() as tasks:
            links = Links(
                SimTransport(own), tasks, Settings().timeouts, lambda *_: None, lambda *told: lost.append(told)
            )
            await links.reach(remote.address)
            stream = links._links[remote.address.peer_id].stream
            works = stream.send

            async def send(frame: bytes) -> None:
                if decode(pb.LinkMessage, frame).WhichOneof("kind") == "ping":
                    return await works(frame)
                if isinstance(error, StreamLost):
                    stream.abort()
                raise error

            stream.send = send  # type: ignore[method-assign]
            with pytest.raises(type(error)):
                await links.send(remote.address, pb.LinkMessage(frame=pb.Frame()))
            await asyncio.sleep(0.1)
            assert lost == ([(remote.address.peer_id, error)] if isinstance(error, StreamLost) else [])
            assert (remote.address.peer_id in links._links) is not isinstance(error, StreamLost)
            await links.aclose()

    run_virtual(main)


async def unwatched(own: SimNode, remote: SimNode, tasks: asyncio.TaskGroup) -> tuple[Links, _Link]:
    """An open link from one to the other, with no pings but those behind a prompt's frames."""
    links = Links(SimTransport(own), tasks, Settings().timeouts, lambda *_: None, lambda *_: None)
    await links.reach(remote.address)
    link = links._links[remote.address.peer_id]
    assert link.watcher is not None
    link.watcher.cancel()
    return links, link


def test_a_token_waits_for_one_frame_of_a_prompt_not_for_one_of_each_session() -> None:
    async def main() -> None:
        network = SimNetwork(random.Random(1), Faults())
        own, remote = network.add("own"), network.add("remote")
        arrived: list[str] = []

        async def handle(stream: Stream) -> None:
            with contextlib.suppress(StreamLost):
                while (frame := await stream.receive()) is not None:
                    message = decode(pb.LinkMessage, frame)
                    if message.HasField("frame"):
                        arrived.append(message.frame.session)

        await SimTransport(remote).serve(LINK, handle)
        async with asyncio.TaskGroup() as tasks:
            links, link = await unwatched(own, remote, tasks)
            takes_at_once, taken = link.stream.send, asyncio.Semaphore(0)

            async def send(frame: bytes) -> None:
                await takes_at_once(frame)
                await taken.acquire()

            link.stream.send = send  # type: ignore[method-assign]
            prompts = [pb.LinkMessage(frame=pb.Frame(session=f"prompt {number}", want_ack=True)) for number in range(3)]
            token = pb.LinkMessage(frame=pb.Frame(session="token"))
            for message in [*prompts, token]:
                tasks.create_task(links.send(remote.address, message))
            await asyncio.sleep(1.0)
            assert arrived == ["prompt 0", "token"]
            for _ in range(7):  # each of the prompts' frames has a ping behind it
                taken.release()
            await asyncio.sleep(1.0)
            assert arrived == ["prompt 0", "token", "prompt 1", "prompt 2"]
            await links.aclose()

    run_virtual(main)


def test_a_prompt_goes_on_though_its_own_ping_is_answered_before_it_waits_for_that() -> None:
    """Whoever sent the frame before was cancelled, so nothing else tells when that has arrived."""

    async def main() -> None:
        network = SimNetwork(random.Random(1), Faults())
        own, remote = network.add("own"), network.add("remote")

        async def handle(stream: Stream) -> None:
            with contextlib.suppress(StreamLost):
                while (frame := await stream.receive()) is not None:
                    message = decode(pb.LinkMessage, frame)
                    if message.HasField("ping"):
                        await stream.send(pb.LinkMessage(pong=message.ping).SerializeToString())

        await SimTransport(remote).serve(LINK, handle)
        async with asyncio.TaskGroup() as tasks:
            links, link = await unwatched(own, remote, tasks)
            link.line.sent(10**6)
            takes_at_once = link.stream.send

            async def send(frame: bytes) -> None:
                await takes_at_once(frame)
                await asyncio.sleep(1.0)

            link.stream.send = send  # type: ignore[method-assign]
            async with asyncio.timeout(10.0):
                await links.send(remote.address, pb.LinkMessage(frame=pb.Frame(want_ack=True)))
            await links.aclose()

    run_virtual(main)


@pytest.mark.parametrize("told", [False, True])
def test_a_line_on_which_nothing_of_a_prompt_arrives_is_lost(told: bool) -> None:
    """Others would wait behind it; one whose sender was cancelled before its ping says nothing of the line."""

    async def main() -> None:
        network = SimNetwork(random.Random(1), Faults())
        own, remote = network.add("own"), network.add("remote")

        async def handle(stream: Stream) -> None:
            with contextlib.suppress(StreamLost):
                while (frame := await stream.receive()) is not None:
                    message = decode(pb.LinkMessage, frame)
                    if message.HasField("frame"):
                        remote.freeze()
                    await stream.send(pb.LinkMessage(pong=message.ping).SerializeToString())

        await SimTransport(remote).serve(LINK, handle)
        lost: list[PeerId] = []
        timeouts = Settings().timeouts
        async with asyncio.TaskGroup() as tasks:
            links = Links(SimTransport(own), tasks, timeouts, lambda *_: None, lambda peer, _: lost.append(peer))
            await links.reach(remote.address)
            await asyncio.sleep(2 * timeouts.heartbeat_s)
            if told:
                await links.send(remote.address, pb.LinkMessage(frame=pb.Frame(want_ack=True)))
            else:
                links._links[remote.address.peer_id].line.sent(1000)
            await asyncio.sleep(timeouts.send_s + 5 * timeouts.heartbeat_s)
            assert lost == [remote.address.peer_id] * told
            remote.resume()
            await links.aclose()

    run_virtual(main)
