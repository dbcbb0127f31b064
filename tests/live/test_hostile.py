"""Clients that lie, babble, stall or vanish: peers stay up, others are unharmed, what was held is released."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from swarm import protocol_pb2 as pb
from swarm.client import AsyncClient, connect_async
from swarm.errors import StreamLost, SwarmError
from swarm.identity import Identity
from swarm.info import describe
from swarm.libp2p import Libp2pTransport
from swarm.local import LocalSwarm
from swarm.multiaddrs import peer_address
from swarm.protocol import address_to_wire
from swarm.session import Generated, Session
from swarm.transport import CONTROL, INFO, LINK, Stream
from swarm.types import PeerAddress
from tests.live.helpers import FROM_ELSEWHERE, SETTINGS, Reference, daemon_of, released, until
from tests.processes import is_gone

pytestmark = [pytest.mark.live, pytest.mark.timeout(60, func_only=True)]

ROOT = Path(__file__).parents[2]
PROMPT = "The capital of France is"
VICTIM_TOKENS = 24
END_OF_STREAM = struct.pack(">I", 0xFFFFFFFF)


class Scene:
    """An honest session that is generating, and an attacker with a p2pd of its own."""

    def __init__(self, peers: LocalSwarm, client: AsyncClient, attacker: Libp2pTransport, session: Session) -> None:
        self.peers, self.client, self.attacker, self.session = peers, client, attacker, session
        self.tokens: list[int] = []
        self.started = asyncio.Event()

    @property
    def addresses(self) -> list[PeerAddress]:
        return [peer_address(address) for address in self.peers.initial_peers]

    async def live(self) -> None:
        async with self.session:
            async for event in self.session.events():
                if isinstance(event, Generated):
                    self.tokens.append(event.token_id)
                    self.started.set()

    async def everyone_answers(self) -> None:
        await asyncio.gather(*(describe(self.client.transport, peer, SETTINGS) for peer in self.addresses))

    async def dial(self, index: int, protocol: str) -> Stream:
        return await self.attacker.open(self.addresses[index], protocol)


@contextlib.asynccontextmanager
async def scene(peers: LocalSwarm, reference: Reference) -> AsyncIterator[Scene]:
    """Afterwards: same tokens, no rebuild, every peer up, nothing reserved."""
    async with (
        connect_async(peers.initial_peers, settings=SETTINGS) as client,
        Libp2pTransport(Identity.ephemeral(), FROM_ELSEWHERE, listen=False) as attacker,
    ):
        request = client.request(PROMPT, max_tokens=VICTIM_TOKENS, temperature=0)
        session = Session(client.transport, client.view, client.profile, request, SETTINGS, client.health)
        played = Scene(peers, client, attacker, session)
        living = asyncio.create_task(played.live())
        try:
            async with asyncio.timeout(30):
                await played.started.wait()
                yield played
                await living
        finally:
            living.cancel()
        assert played.tokens == reference.greedy(request.prompt, VICTIM_TOKENS)
        assert session.rebuilds == []
        assert [hop.peer.peer_id for hop in session.route.hops] == [peer.peer_id for peer in peers.peers[:3]]
        assert all(peer.alive for peer in peers.peers[:3])
        await played.everyone_answers()
        await released(client, peers)


def write_raw(stream: Stream, data: bytes) -> None:
    """Past the framing."""
    stream._writer.write(data)  # type: ignore[attr-defined]


async def ended(stream: Stream, limit_s: float = 8.0) -> list[bytes]:
    """What the peer still says until it ends the stream, in whatever way."""
    said: list[bytes] = []
    async with asyncio.timeout(limit_s):
        try:
            while (frame := await stream.receive()) is not None:
                said.append(frame)
        except StreamLost:
            pass
    stream.abort()
    return said


def an_open(scene: Scene, index: int, **changes: Any) -> pb.ControlRequest:
    """An honest ``Open`` for all the layers of a peer, but for ``changes``."""
    layers = scene.peers.peers[index].layers
    fields: dict[str, Any] = {
        "session": f"attack{random.randrange(10**9)}",
        "epoch": 1,
        "model": scene.client.profile.model_id,
        "start": layers.start,
        "end": layers.end,
        "max_positions": 64,
        "previous": [scene.attacker.local.peer_id],
    }
    return pb.ControlRequest(open=pb.Open(**fields | changes))


async def reply(stream: Stream) -> pb.ControlReply:
    """The next one that is no heartbeat."""
    async with asyncio.timeout(8):
        while True:
            frame = await stream.receive()
            assert frame is not None, "the stream ended without a word"
            parsed = pb.ControlReply.FromString(frame)
            if parsed.WhichOneof("kind") != "status":
                return parsed


async def answer(scene: Scene, index: int, *requests: pb.ControlRequest) -> str:
    """Say all that on one control stream; the code of the last reply, or its kind."""
    stream = await scene.dial(index, CONTROL)
    try:
        for request in requests:
            await stream.send(request.SerializeToString())
        said = await reply(stream)
        while said.WhichOneof("kind") == "opened" and len(requests) > 1:
            said = await reply(stream)
        return said.error.code or str(said.WhichOneof("kind"))
    finally:
        await stream.close()


async def test_garbage_on_every_protocol(thirds: LocalSwarm, reference: Reference) -> None:
    rng = random.Random(5)
    async with scene(thirds, reference) as here:
        good = {
            CONTROL: an_open(here, 1).SerializeToString(),
            LINK: pb.LinkMessage(frame=pb.Frame(session="x", hidden=pb.Tensor(dtype="float32"))).SerializeToString(),
            INFO: pb.InfoRequest(model_file="tokenizer.json").SerializeToString(),
        }
        silent = [await here.dial(index, CONTROL) for index in range(3)]  # opened, then nothing: for as long as it may
        for protocol, message in good.items():
            frames = [b"", b"\0", message[: len(message) // 2], rng.randbytes(100), rng.randbytes(100_000)]
            for frame in frames:
                stream = await here.dial(1, protocol)
                await stream.send(frame)
                await ended(stream)
            for raw in (b"\x7f\xff\xff\xff", b"\xff\xff\xff\xfe" + bytes(1000), struct.pack(">I", 17 * 1024 * 1024)):
                stream = await here.dial(1, protocol)
                write_raw(stream, raw)
                await ended(stream)
            stream = await here.dial(1, protocol)
            write_raw(stream, struct.pack(">I", 1000) + b"only the beginning")
            stream.abort()
            stream = await here.dial(1, protocol)
            write_raw(stream, END_OF_STREAM)
            await ended(stream)
        wrong_kind = pb.LinkMessage(ack=pb.Ack(session=here.session.session_id, epoch=1, layer=10))
        stream = await here.dial(0, LINK)
        await stream.send(wrong_kind.SerializeToString())
        await ended(stream)
        for request in (pb.ControlRequest(ping=True), pb.ControlRequest(input=pb.Input(token_ids=[1]))):
            assert await answer(here, 0, request) == "protocol"
        assert [await ended(stream, limit_s=12) for stream in silent] == [[], [], []]


async def test_more_streams_than_one_peer_may_open(thirds: LocalSwarm, reference: Reference) -> None:
    limit = SETTINGS.limits.max_streams_per_peer
    async with scene(thirds, reference) as here:
        streams = [await here.dial(0, CONTROL) for _ in range(limit + 20)]
        over = [asyncio.create_task(ended(stream)) for stream in streams[limit:]]
        assert await asyncio.gather(*over) == [[]] * 20, "those past the limit are dropped at once"
        await here.everyone_answers()
        for stream in streams[:limit]:
            stream.abort()
        assert await answer(here, 0, an_open(here, 0)) == "opened", "and there is room again"


async def test_senseless_requests_are_answered_with_their_error(thirds: LocalSwarm, reference: Reference) -> None:
    vocabulary = 49152
    async with scene(thirds, reference) as here:
        refused = {
            "bad_request": [
                {"model": "another@0"},
                {"session": ""},
                {"session": "x" * 65},
                {"keep": 65},
                {"token_ids": [1] * 65, "start": 20, "end": 30, "index": 2},
                {"token_ids": [vocabulary], "index": 2},
                {"sampling": pb.Sampling(temperature=float("nan"), top_p=1, repetition_penalty=1), "index": 2},
                {"sampling": pb.Sampling(temperature=-1, top_p=1, repetition_penalty=1), "index": 2},
            ],
            "wrong_range": [{"end": 15}, {"start": 5, "end": 5}, {"start": 9, "end": 2}, {"end": 2**31}],
            "too_long": [{"max_positions": 0}, {"max_positions": 4097}, {"max_positions": 2**32 - 1}],
        }
        for code, cases in refused.items():
            for case in cases:
                changes = dict(case)
                index = changes.pop("index", 0)
                assert await answer(here, index, an_open(here, index, **changes)) == code, case
        after_open = {
            "bad_request": pb.ControlRequest(input=pb.Input(epoch=1, start=0, token_ids=[5, vocabulary])),
            "gap": pb.ControlRequest(input=pb.Input(epoch=1, start=7, token_ids=[5])),
            "too_long": pb.ControlRequest(input=pb.Input(epoch=1, start=0, token_ids=[5] * 65)),
            "protocol": pb.ControlRequest(start=pb.Start(epoch=1, targets=[pb.Target(epoch=1)] * 5)),
        }
        for code, request in after_open.items():
            assert await answer(here, 0, an_open(here, 0), request) == code
        tokens_for_the_middle = pb.ControlRequest(input=pb.Input(epoch=1, start=0, token_ids=[5]))
        assert await answer(here, 1, an_open(here, 1), tokens_for_the_middle) == "protocol"
        nobody = pb.Target(epoch=1, layer=10, peer=pb.Address(peer_id="nobody", multiaddrs=["/unix/etc/passwd"]))
        feed = pb.ControlRequest(input=pb.Input(epoch=1, start=0, token_ids=[5]))
        to_nobody = pb.ControlRequest(start=pb.Start(epoch=1, targets=[nobody]))
        assert await answer(here, 0, an_open(here, 0), to_nobody, feed) == "unreachable"


async def test_wrong_tensors_concern_their_own_session_only(thirds: LocalSwarm, reference: Reference) -> None:
    width = 576
    async with scene(thirds, reference) as here:

        def tensor(data: bytes, dtype: str = "float32", shape: tuple[int, ...] = (1, width)) -> pb.Tensor:
            return pb.Tensor(dtype=dtype, shape=shape, data=data)

        row = bytes(4 * width)
        wrong = {
            "dtype": tensor(row, "float64"),
            "another dtype": tensor(row[: 2 * width], "bfloat16"),
            "width": tensor(row[:400], shape=(1, 100)),
            "rank": tensor(row, shape=(width,)),
            "no rows": tensor(b"", shape=(0, width)),
            "lying shape": tensor(row, shape=(2**32 - 1, width)),
            "too few bytes": tensor(row[:-1]),
            "too many rows": tensor(65 * row, shape=(65, width)),
            "nan": tensor(row[:-4] + struct.pack("<f", float("nan"))),
            "infinite": tensor(struct.pack("<f", float("-inf")) + row[4:]),
        }
        control, link = await here.dial(1, CONTROL), await here.dial(1, LINK)
        opened = an_open(here, 1)
        await control.send(opened.SerializeToString())
        assert (await reply(control)).WhichOneof("kind") == "opened"
        frame = pb.Frame(session=opened.open.session, epoch=1, layer=10)
        sequence = 0
        for name, hidden in wrong.items():
            frame.sequence = sequence
            frame.hidden.CopyFrom(hidden)
            await link.send(pb.LinkMessage(frame=frame).SerializeToString())
            assert (await reply(control)).error.code == "bad_tensor", name
            sequence += name in ("nan", "infinite")  # those two got past the door
        frame.sequence = sequence
        frame.hidden.CopyFrom(tensor(struct.pack("<f", 3e38) * width))  # finite, until it is squared
        await link.send(pb.LinkMessage(frame=frame).SerializeToString())
        status = pb.ControlRequest(ping=True)
        await control.send(status.SerializeToString())
        both = pb.LinkMessage(frame=pb.Frame(session=opened.open.session, epoch=1, layer=10, token_ids=[1]))
        await link.send(both.SerializeToString())
        assert (await reply(control)).error.code in ("protocol", "internal")
        await link.close()
        await control.close()


async def test_strangers_reach_no_session(thirds: LocalSwarm, reference: Reference) -> None:
    async with scene(thirds, reference) as here:
        session, epoch = here.session.session_id, 1
        row = pb.Tensor(dtype="float32", shape=[1, 576], data=bytes(4 * 576))
        link = await here.dial(1, LINK)
        for hidden in (row, pb.Tensor(dtype="nonsense")):
            for start in (0, 3, 5000):
                frame = pb.Frame(session=session, epoch=epoch, sequence=0, layer=10, start=start, hidden=hidden)
                await link.send(pb.LinkMessage(frame=frame).SerializeToString())
                answered = pb.LinkMessage.FromString(await receive(link))
                assert answered.refusal.error.code == "not_allowed"
        unknown = pb.Frame(session="nobody's", epoch=1, layer=10, hidden=row)
        await link.send(pb.LinkMessage(frame=unknown).SerializeToString())
        assert pb.LinkMessage.FromString(await receive(link)).refusal.error.code == "evicted"
        await link.close()
        taken_over = an_open(here, 1, session=session, epoch=2**31, max_positions=64)
        assert await answer(here, 1, taken_over) == "not_allowed"


async def test_a_last_stage_is_not_upset_by_wishes(thirds: LocalSwarm, reference: Reference) -> None:
    """Sampling at the edge of what may be asked for, in one batch with an honest session."""
    wishes = [
        pb.Sampling(temperature=1e-40, top_p=1e-30, repetition_penalty=0.01, seed=2**64 - 1),
        pb.Sampling(temperature=100, top_p=1, repetition_penalty=100, min_p=1, top_k=2**32 - 1),
        pb.Sampling(temperature=1, top_p=1, repetition_penalty=1, logit_bias={2**32 - 1: 100, 5: -100}, logprobs=20),
        pb.Sampling(temperature=1, top_p=1, repetition_penalty=1, presence_penalty=-2, frequency_penalty=2),
    ]
    async with scene(thirds, reference) as here:
        link = await here.dial(2, LINK)
        for wish in wishes:
            control = await here.dial(2, CONTROL)
            opened = an_open(here, 2, sampling=wish, token_ids=[1, 2], stop_at=10, prompt_length=2**32 - 1)
            to_me = pb.Target(epoch=1, forward_from=1)
            for request in (opened, pb.ControlRequest(start=pb.Start(epoch=1, targets=[to_me]))):
                await control.send(request.SerializeToString())
            assert (await reply(control)).WhichOneof("kind") == "opened"
            hidden = pb.Tensor(dtype="float32", shape=[2, 576], data=bytes(8 * 576))
            frame = pb.Frame(session=opened.open.session, epoch=1, layer=20, hidden=hidden)
            await link.send(pb.LinkMessage(frame=frame).SerializeToString())
            assert (await reply(control)).WhichOneof("kind") in ("output", "error")
            await control.close()
        await link.close()


async def test_a_stage_whose_target_is_itself_or_a_deaf_peer(thirds: LocalSwarm, reference: Reference) -> None:
    """Targets are what an owner says: a stage that feeds itself, and one that feeds a stage which isn't there."""
    async with scene(thirds, reference) as here:
        controls = []
        itself, deaf, another = here.addresses[:3]
        for peer, layer, code in ((itself, 0, "wrong_range"), (deaf, 10, "evicted"), (another, 10, "evicted")):
            control = await here.dial(0, CONTROL)
            opened = an_open(here, 0, previous=[here.addresses[0].peer_id])
            target = pb.Target(epoch=1, layer=layer, peer=address_to_wire(peer), forward_from=0)
            for request in (
                opened,
                pb.ControlRequest(start=pb.Start(epoch=1, targets=[target])),
                pb.ControlRequest(input=pb.Input(epoch=1, start=0, token_ids=[1, 2, 3])),
            ):
                await control.send(request.SerializeToString())
            assert (await reply(control)).WhichOneof("kind") == "opened"
            assert (await reply(control)).error.code == code
            controls.append(control)
        for control in controls:
            await control.close()


async def test_a_client_that_is_killed_frees_its_stages(thirds: LocalSwarm, reference: Reference) -> None:
    joins = [part for address in thirds.initial_peers for part in ("--initial-peers", address)]
    command = [sys.executable, "-m", "swarm.cli", "generate", "x", "--max-tokens", "2000", "--json", *joins]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SWARM_")}
    async with scene(thirds, reference) as here:
        vanishing = await asyncio.create_subprocess_exec(
            *command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT, env=environment
        )
        assert vanishing.stdout is not None
        for _ in range(4):
            assert await vanishing.stdout.readline()
        told = await asyncio.gather(*(describe(here.client.transport, peer, SETTINGS) for peer in here.addresses))
        assert all(description.sessions >= 1 for description in told)
        daemon = daemon_of(vanishing.pid)
        vanishing.send_signal(signal.SIGKILL)
        await vanishing.wait()
        await until(lambda: is_gone(daemon), "its p2pd ended", limit_s=5)
        # the scene's end: what it held is released, after timeouts.owner_grace_s


async def receive(stream: Stream) -> bytes:
    async with asyncio.timeout(8):
        frame = await stream.receive()
    assert frame is not None
    return frame


async def test_an_owner_that_does_not_listen_is_cut_off(thirds: LocalSwarm, reference: Reference) -> None:
    """It opens stages and sends frames, and never reads what it is answered."""
    async with scene(thirds, reference) as here:
        link = await here.dial(1, LINK)
        unknown = pb.Frame(session="nobody's", epoch=1, layer=10, hidden=pb.Tensor(data=bytes(100)))
        message = pb.LinkMessage(frame=unknown).SerializeToString()
        with contextlib.suppress(SwarmError):
            for _ in range(20_000):
                await link.send(message)
        link.abort()
        await here.everyone_answers()
