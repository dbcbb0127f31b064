"""Both ends of a control stream: the owner's against a peer that answers as the test says, and a peer's."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random

import pytest

from swarm import protocol_pb2 as pb
from swarm.config import Settings
from swarm.control import Event, HopControl
from swarm.delegation import request_from_wire
from swarm.errors import BadRequest, Busy, DeadlineExceeded, Evicted, StreamLost
from swarm.protocol import MAX_END_IDS, address_to_wire, decode
from swarm.sampling import SamplingParams
from swarm.testing import Faults, SimNetwork, SimTransport, run_virtual
from swarm.transcript import GenerationRequest
from swarm.transport import CONTROL, Stream
from swarm.types import Hop, LayerRange
from tests.sim.world import PROFILE, World


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
                await asyncio.sleep(1)  # for what is said after the answer
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


def test_the_answer_to_an_open_that_was_given_up_is_no_answer_to_the_next() -> None:
    control, _ = opened(pb.ControlReply(opened=pb.Opened(epoch=1, have=9)), ANSWER)
    assert control.have == 5


@pytest.mark.parametrize("question", ["open", "fetch"])
def test_a_question_that_can_no_longer_be_asked_leaves_nobody_waiting(question: str) -> None:
    """The stream broke just now. That was told to nobody, and Python complained of it on the terminal."""

    async def main() -> None:
        complaints: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["message"]))
        network = SimNetwork(random.Random(1), Faults())
        owner, peer = network.add("owner"), network.add("peer")

        async def handle(stream: Stream) -> None:
            with contextlib.suppress(StreamLost):
                await stream.receive()

        await SimTransport(peer).serve(CONTROL, handle)
        heard: list[Event] = []
        async with asyncio.TaskGroup() as tasks:
            hop, transport = Hop(peer.address, LayerRange(0, 1)), SimTransport(owner)
            control = await HopControl.dial(hop, transport, Settings(), lambda _, event: heard.append(event), tasks)
            await asyncio.sleep(1)
            peer.break_streams()
            with pytest.raises(StreamLost):
                await (control.open(pb.Open(session="s", epoch=2)) if question == "open" else control.fetch(0, 1))
            await asyncio.sleep(1)
        assert [type(event) for event in heard] == [StreamLost]
        heard.clear()
        del control
        gc.collect()
        assert not complaints

    run_virtual(main)


def test_an_answer_that_comes_in_drops_is_not_waited_for_for_ever() -> None:
    async def main() -> float:
        world = World(1)
        peer = await world.add_peer(LayerRange(0, 6))
        world.network.bytes_per_s[peer.node.address.peer_id, world.owner.address.peer_id] = 1e-3
        async with asyncio.TaskGroup() as tasks:
            hop = Hop(peer.node.address, LayerRange(0, 6))
            control = await HopControl.dial(hop, SimTransport(world.owner), Settings(), lambda *_: None, tasks)
            with pytest.raises(DeadlineExceeded):
                await control.open(
                    pb.Open(session="s", epoch=1, model=PROFILE.model_id, end=6, max_positions=8, token_ids=[1])
                )
            control.abort()
        peer.node.kill()
        return asyncio.get_running_loop().time()

    assert run_virtual(main) == pytest.approx(Settings().timeouts.session_idle_s, abs=5)


def test_a_heartbeat_of_an_older_epoch_does_not_bring_back_what_the_open_took() -> None:
    def heartbeat(epoch: int, have: int) -> pb.ControlReply:
        return pb.ControlReply(status=pb.Status(epoch=epoch, have=have))

    assert opened(ANSWER, heartbeat(1, 9))[0].have == 5
    assert opened(ANSWER, heartbeat(2, 7))[0].have == 7


@pytest.mark.parametrize(
    ("told_s", "silence_s"), [(0.0, 3.0), (0.2, 3.0), (4.0, 12.0), (1e9, 30.0), (float("nan"), 3.0), (-1.0, 3.0)]
)
def test_a_peer_is_heard_as_often_as_it_said_that_it_beats(told_s: float, silence_s: float) -> None:
    """Its settings need not be the owner's: one that beats more rarely was lost again and again."""
    control, _ = opened(pb.ControlReply(opened=pb.Opened(epoch=2, have=5, heartbeat_s=told_s)))

    async def silent_for() -> float:
        control.last_heard = began = asyncio.get_running_loop().time()
        while True:
            await asyncio.sleep(0.1)
            try:
                control.check_heard()
            except DeadlineExceeded:
                return asyncio.get_running_loop().time() - began

    assert run_virtual(silent_for) == pytest.approx(silence_s, abs=0.2)


def test_only_a_heartbeat_that_tells_of_a_leave_is_an_event() -> None:
    """Nobody listens to the others, and a session whose reader is slow kept them all."""

    def heartbeat(**told: object) -> pb.ControlReply:
        return pb.ControlReply(status=pb.Status(epoch=2, have=7, **told))  # type: ignore[arg-type]

    leaving = heartbeat(draining=True)
    control, heard = opened(ANSWER, heartbeat(computing=True), leaving)
    assert heard == [leaving.status]
    assert control.have == 7


def test_last_words_say_why_a_stream_ended() -> None:
    last_words = pb.ControlReply(error=pb.Error(code="evicted", message="gone"))
    control, heard = opened(ANSWER, last_words)
    assert isinstance(control.lost, Evicted)
    assert heard == [control.lost]


def test_a_refusal_is_the_answer_to_an_open() -> None:
    with pytest.raises(ExceptionGroup) as caught:
        opened(pb.ControlReply(error=pb.Error(code="busy", message="full")))
    assert caught.group_contains(Busy, match="full")


@pytest.mark.parametrize(
    ("layers", "layer", "to_a_peer", "refused"),
    [
        (LayerRange(0, 2), 2, True, False),
        (LayerRange(2, 4), 4, True, False),
        (LayerRange(4, 6), 0, True, False),
        (LayerRange(4, 6), 0, False, False),
        (LayerRange(0, 6), 0, True, False),
        (LayerRange(0, 2), 0, True, True),
        (LayerRange(2, 4), 2, True, True),
        (LayerRange(2, 4), 3, True, True),
        (LayerRange(2, 4), 0, True, True),
        (LayerRange(4, 6), 4, True, True),
        (LayerRange(2, 4), 0, False, True),
    ],
)
def test_a_stage_goes_on_only_to_the_layer_that_follows(
    layers: LayerRange, layer: int, to_a_peer: bool, refused: bool
) -> None:
    """Not to itself, above all: its outputs would be its inputs."""

    async def main() -> str:
        world = World(1)
        peer = await world.add_peer(LayerRange(0, 6))
        stream = await SimTransport(world.owner).open(peer.node.address, CONTROL)
        to = address_to_wire(peer.node.address) if to_a_peer else None
        target = pb.Target(epoch=1, peer=to, layer=layer)
        opening = pb.Open(
            session="s",
            epoch=1,
            model=PROFILE.model_id,
            start=layers.start,
            end=layers.end,
            max_positions=8,
            sampling=SamplingParams(temperature=0).to_wire(),
            token_ids=[1],
            stop_at=8,
            prompt_length=1,
        )
        for request in (
            pb.ControlRequest(open=opening),
            pb.ControlRequest(start=pb.Start(epoch=1, targets=[target])),
            pb.ControlRequest(ping=True),
        ):
            await stream.send(request.SerializeToString())
        replies = [decode(pb.ControlReply, await stream.receive() or b"") for _ in range(2)]
        stream.abort()
        assert replies[0].WhichOneof("kind") == "opened"
        return replies[1].error.code

    assert run_virtual(main) == ("wrong_range" if refused else "")


def test_tokens_that_end_a_text_are_few() -> None:
    """They are in no budget: a stage kept as many millions as a frame has room for."""

    async def main() -> str:
        world = World(1)
        peer = await world.add_peer(LayerRange(0, 6))
        stream = await SimTransport(world.owner).open(peer.node.address, CONTROL)
        ids = range(MAX_END_IDS + 1)
        opening = pb.Open(session="s", model=PROFILE.model_id, end=6, max_positions=8, token_ids=[1], end_ids=ids)
        await stream.send(pb.ControlRequest(open=opening).SerializeToString())
        reply = decode(pb.ControlReply, await stream.receive() or b"")
        assert not peer.service.table.runners
        assert str(MAX_END_IDS) in reply.error.message
        return reply.error.code

    assert run_virtual(main) == "bad_request"

    def asked(end_ids: range) -> GenerationRequest:
        return request_from_wire(
            pb.Delegate(model=PROFILE.model_id, prompt=[1], max_tokens=1, end_ids=end_ids), PROFILE
        )

    assert len(asked(range(MAX_END_IDS)).end_ids) == MAX_END_IDS
    with pytest.raises(BadRequest, match=str(MAX_END_IDS)):
        asked(range(MAX_END_IDS + 1))
    with pytest.raises(BadRequest, match=str(MAX_END_IDS)):  # before any peer is blamed for its refusal
        GenerationRequest((1,), 1, SamplingParams(), frozenset(range(MAX_END_IDS + 1)))


def test_a_control_stream_is_for_one_stage() -> None:
    """The stages of all others would outlive it: only the last one was let go of at its end."""

    async def main() -> None:
        world = World(1)
        peer = await world.add_peer(LayerRange(0, 6))
        stream = await SimTransport(world.owner).open(peer.node.address, CONTROL)
        codes = []
        for session in ("one", "two"):
            opening = pb.Open(session=session, model=PROFILE.model_id, end=6, max_positions=8, token_ids=[1])
            await stream.send(pb.ControlRequest(open=opening).SerializeToString())
            codes.append(decode(pb.ControlReply, await stream.receive() or b"").error.code)
        await stream.close()
        await asyncio.sleep(2 * world.settings.timeouts.owner_grace_s)
        assert not peer.service.table.runners
        assert codes == ["", "protocol"]
        await world.settle()

    run_virtual(main)


@pytest.mark.parametrize(("epoch", "code"), [(3, ""), (1, "stale_epoch")])
def test_a_stage_that_was_lost_makes_way_for_one_with_other_layers(epoch: int, code: str) -> None:
    """Its owner has cut the route anew before it was gone; a late open of an old route gets nothing."""

    async def main() -> None:
        world = World(1)
        peer = await world.add_peer(LayerRange(0, 6))

        async def answer(epoch: int, end: int) -> pb.ControlReply:
            stream = await SimTransport(world.owner).open(peer.node.address, CONTROL)
            opening = pb.Open(session="s", epoch=epoch, model=PROFILE.model_id, end=end, max_positions=8, token_ids=[1])
            await stream.send(pb.ControlRequest(open=opening).SerializeToString())
            reply = decode(pb.ControlReply, await stream.receive() or b"")
            stream.abort()
            return reply

        assert (await answer(2, 6)).opened.epoch == 2
        reply = await answer(epoch, 4)
        assert (reply.error.code, reply.opened.epoch) == (code, 0 if code else epoch)
        await world.settle()

    run_virtual(main)


async def asked_to_open(world: World, epoch: int, end: int = 6) -> Stream:
    """A control stream to the world's first peer, whose stage this is to be; half a second later."""
    stream = await SimTransport(world.owner).open(world.peers[0].node.address, CONTROL)
    opening = pb.Open(session="s", epoch=epoch, model=PROFILE.model_id, end=end, max_positions=8, token_ids=[1])
    await stream.send(pb.ControlRequest(open=opening).SerializeToString())
    await asyncio.sleep(0.5)
    return stream


def test_an_open_that_comes_too_late_does_not_set_a_term_for_the_stage_in_its_place() -> None:
    """It waited for a long step of the old stage; the new one belongs to who opened it meanwhile."""

    async def main() -> None:
        world = World(1)
        peer = await world.add_peer(LayerRange(0, 6))
        table, step = peer.service.table, asyncio.Event()

        first = await asked_to_open(world, 1)
        first.abort()
        await asyncio.sleep(0.5)
        old = next(iter(table.runners.values()))

        async def ends_its_step(request: object) -> None:
            await step.wait()

        old.reopen = ends_its_step  # type: ignore[method-assign]
        late = await asked_to_open(world, 2)
        newest = await asked_to_open(world, 3, end=4)
        step.set()
        await asyncio.sleep(2 * world.settings.timeouts.owner_grace_s)
        assert [runner.stage.epoch for runner in table.runners.values()] == [3]
        late.abort()
        newest.abort()
        await world.settle()

    run_virtual(main)


def test_an_older_stream_that_ends_sets_no_term_for_a_stage_whose_owner_waits_on_a_newer_one() -> None:
    """The stage has a long step to end; the older stream was lost to its owner, and the peer has just noticed."""

    async def main() -> None:
        world = World(1)
        peer = await world.add_peer(LayerRange(0, 6))
        table, step = peer.service.table, asyncio.Event()

        older = await asked_to_open(world, 1)
        [runner] = table.runners.values()

        async def ends_its_step(request: object) -> None:
            await step.wait()

        runner.reopen = ends_its_step  # type: ignore[method-assign]
        newer = await asked_to_open(world, 2)
        older.abort()
        await asyncio.sleep(2 * world.settings.timeouts.owner_grace_s)
        assert list(table.runners.values()) == [runner]
        step.set()
        await asyncio.sleep(2 * world.settings.timeouts.owner_grace_s)
        assert list(table.runners.values()) == [runner]
        newer.abort()
        await world.settle()

    run_virtual(main)
