"""The owner's end of a control stream, against a peer that answers as the test says."""

from __future__ import annotations

import asyncio
import random

import pytest

from swarm import protocol_pb2 as pb
from swarm.config import Settings
from swarm.control import Event, HopControl
from swarm.errors import Busy
from swarm.testing import Faults, SimNetwork, SimTransport, run_virtual
from swarm.transport import CONTROL, Stream
from swarm.types import Hop, LayerRange


def opened(*replies: pb.ControlReply) -> tuple[HopControl, list[Event]]:
    """Open epoch 2 at a peer that says ``replies``; raises what :meth:`HopControl.open` raises."""

    async def main() -> tuple[HopControl, list[Event]]:
        network = SimNetwork(random.Random(1), Faults())
        owner, peer = network.add("owner"), network.add("peer")

        async def handle(stream: Stream) -> None:
            await stream.receive()
            for reply in replies:
                await stream.send(reply.SerializeToString())
            await stream.receive()

        await SimTransport(peer).serve(CONTROL, handle)
        heard: list[Event] = []
        hop = Hop(peer.address, LayerRange(0, 1))
        async with asyncio.TaskGroup() as tasks:
            transport = SimTransport(owner)
            control = await HopControl.dial(hop, transport, Settings(), lambda _, event: heard.append(event), tasks)
            try:
                await control.open(pb.Open(session="s", epoch=2, keep=9))
            finally:
                await control.close()
        return control, heard

    return run_virtual(main)


ANSWER = pb.ControlReply(opened=pb.Opened(epoch=2, have=5))


def test_an_error_of_an_older_epoch_is_no_answer_to_an_open() -> None:
    """It crossed the open on its way: a neighbour that left was missed while the route was being changed for that."""
    late = pb.ControlReply(error=pb.Error(code="stream_lost", message="gone", peer_id="left", epoch=1))
    control, heard = opened(late, ANSWER)
    assert control.have == 5
    assert heard == [late.error]


def test_a_refusal_is_the_answer_to_an_open() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        opened(pb.ControlReply(error=pb.Error(code="busy", message="full")))
    assert caught.group_contains(Busy, match="full")
