"""What hops say faster than a session listens."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

import swarm.events
from swarm import protocol_pb2 as pb
from swarm.protocol import decode
from swarm.sampling import SamplingParams
from swarm.session import Generated, GenerationRequest, Session
from swarm.testing import SimTransport, run_virtual
from swarm.transport import CONTROL, Stream
from swarm.types import LayerRange
from tests.sim.world import PROFILE, World

LIMIT_BYTES = 100_000


def test_a_hop_that_says_more_than_is_heard_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """It filled the memory of a client whose reader was slow."""
    monkeypatch.setattr(swarm.events, "MAX_UNHEARD_BYTES", LIMIT_BYTES)

    async def main() -> None:
        world = World(1)
        honest, chatty = [await world.add_peer(layers) for layers in (LayerRange(0, 3), LayerRange(3, 6))]
        handle = chatty.node.handlers[CONTROL]
        said = pb.ControlReply(output=pb.Output(token_ids=[1])).SerializeToString()

        async def chat(stream: Stream) -> None:
            opening = decode(pb.ControlRequest, await stream.receive() or b"").open
            await stream.send(pb.ControlReply(opened=pb.Opened(epoch=opening.epoch)).SerializeToString())
            chatty.node.handlers[CONTROL] = handle  # who asks again is served
            for _ in range(1000):
                await stream.send(said)
            await stream.receive()

        chatty.node.handlers[CONTROL] = chat
        request = GenerationRequest((1, 2), 5, SamplingParams(temperature=0), frozenset())
        session = Session(SimTransport(world.owner), world.directory, PROFILE, request, world.settings, world.health)
        tokens = []
        async with session, contextlib.aclosing(session.events()) as events:
            async for event in events:
                if isinstance(event, Generated):
                    tokens.append(event.token_id)
                elif not session.rebuilds:
                    (control,) = session._chain.controls[1:]
                    await asyncio.sleep(2.0)  # a slow reader
                    assert control.unheard_bytes < LIMIT_BYTES + 2 * swarm.events.EVENT_BYTES
                    assert session._chain.controls[0].lost is None
        assert tokens == world.decoder.generate([1, 2], 5, 0, frozenset())
        (rebuild,) = session.rebuilds
        assert [hop.peer for hop in rebuild.lost] == [chatty.node.address]
        assert f"more than {LIMIT_BYTES} bytes" in rebuild.reason
        honest.life.cancel()
        chatty.life.cancel()

    run_virtual(main)
