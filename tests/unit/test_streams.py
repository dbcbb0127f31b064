"""Framing over a socket pair: what a lying, stalling or dying remote can do to it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator

import pytest

from swarm import awake, streams
from swarm.errors import ProtocolError, StreamLost
from swarm.streams import END, HEADER, FramedStream, PartialFrames
from swarm.types import PeerId

REMOTE = PeerId("12D3KooWRemote")
MAX = 4 * 1024 * 1024


@contextlib.asynccontextmanager
async def pair(
    send_s: float = 2.0, partial: PartialFrames | None = None, remote: PeerId = REMOTE
) -> AsyncIterator[tuple[FramedStream, asyncio.StreamReader, asyncio.StreamWriter]]:
    """A stream and the raw far end of it."""
    left, right = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=left)
    far_reader, far_writer = await asyncio.open_connection(sock=right)
    stream = FramedStream(remote, reader, writer, max_frame_bytes=MAX, send_s=send_s, partial=partial)
    try:
        yield stream, far_reader, far_writer
    finally:
        stream.abort()
        far_writer.transport.abort()
        await asyncio.sleep(0)


def shrink(stream: FramedStream) -> None:
    """The system's buffer, so that what is not read yet stays in ours."""
    stream._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


@pytest.fixture(autouse=True)
def _short_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_LINGER_S", 0.05)


async def test_frames_of_all_sizes_arrive_in_order() -> None:
    async with pair() as (near, reader, writer):
        far = FramedStream(REMOTE, reader, writer, max_frame_bytes=MAX, send_s=2.0)
        sizes = [0, 1, 2300, 65535, 65536, 65537, 262144, 262145, MAX]

        async def send() -> None:
            for size in sizes:
                await near.send(bytes([size % 251]) * size)
            await near.close()

        async with asyncio.TaskGroup() as group:
            group.create_task(send())
            assert [await far.receive() for _ in sizes] == [bytes([size % 251]) * size for size in sizes]
            assert await far.receive() is None
            assert await far.receive() is None
        await far.close()


async def test_frames_of_one_turn_of_the_loop_are_one_write() -> None:
    async with pair() as (near, reader, _):
        writes: list[bytes] = []
        write = near._transport.write

        class Counting:
            def __getattr__(self, name: str) -> object:
                return getattr(transport, name)

            def write(self, data: bytes) -> None:
                writes.append(data)
                write(data)

        transport, near._transport = near._transport, Counting()  # type: ignore[assignment]
        assert near.try_send(b"one")
        await near.send(b"two")
        await near.send(b"")
        assert not writes
        await asyncio.sleep(0)
        expected = b"".join(HEADER.pack(len(frame)) + frame for frame in (b"one", b"two", b""))
        assert writes == [expected]
        await near.send(b"last")
        await near.close()
        assert await reader.readexactly(len(expected) + 12) == expected + HEADER.pack(4) + b"last" + HEADER.pack(END)


@pytest.mark.parametrize("sent", [b"", b"\0", HEADER.pack(5) + b"four", HEADER.pack(300_000) + bytes(1000)])
async def test_an_eof_without_end_frame_is_a_lost_stream(sent: bytes) -> None:
    async with pair() as (near, _, writer):
        writer.write(sent)
        writer.close()
        with pytest.raises(StreamLost, match="without its end frame"):
            await near.receive()
        with pytest.raises(StreamLost):
            await near.send(b"x")
        with pytest.raises(StreamLost):
            await near.receive()


async def test_a_lying_length_is_refused_before_anything_is_read() -> None:
    async with pair() as (near, reader, writer):
        writer.write(HEADER.pack(END - 1) + bytes(100))
        with pytest.raises(ProtocolError, match="announced a frame of 4294967294 bytes"):
            await near.receive()
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""


async def test_a_frame_over_the_limit_is_not_sent() -> None:
    async with pair() as (near, reader, _):
        with pytest.raises(ProtocolError, match="max_frame_bytes"):
            await near.send(bytes(MAX + 1))
        await near.send(b"next")
        assert await reader.readexactly(8) == HEADER.pack(4) + b"next"


@pytest.mark.parametrize("size", [5, 300_000])
async def test_a_stall_in_the_middle_of_a_frame_has_a_deadline(size: int) -> None:
    async with pair(send_s=0.05) as (near, _, writer):
        writer.write(HEADER.pack(size) + b"abc")
        with pytest.raises(StreamLost, match="middle of a frame"):
            await near.receive()


@pytest.mark.parametrize("size", [100, 1 << 20])
async def test_the_time_in_which_this_process_stood_still_is_no_stall(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(awake, "TICK_S", 0.05)
    async with pair(send_s=0.3) as (stream, _, far):
        frame = b"x" * size
        far.write(HEADER.pack(size) + frame[:10])

        def stand_still() -> None:
            far.write(frame[10:])
            time.sleep(0.6)

        asyncio.get_running_loop().call_later(0.1, stand_still)
        assert await stream.receive() == frame


async def test_a_frame_that_arrives_slowly_is_waited_for() -> None:
    async with pair(send_s=1.0) as (near, _, writer):
        assert near.arrived_at == 0.0
        writer.write(HEADER.pack(200_000))
        receiving, known_at = asyncio.create_task(near.receive()), 0.0
        for _ in range(5):
            writer.write(bytes(40_000))
            await asyncio.sleep(0.3)
            assert near.arrived_at > known_at, "the remote is there"
            known_at = near.arrived_at
        assert await receiving == bytes(200_000)


async def test_a_remote_that_reads_nothing_blocks_the_sender_until_the_deadline() -> None:
    async with pair(send_s=0.1) as (near, _, _writer):

        async def flood() -> None:
            for _ in range(100):
                await near.send(bytes(1024 * 1024))

        with pytest.raises(StreamLost, match=r"took nothing for 0\.1 s"):
            await asyncio.wait_for(flood(), 5)


@pytest.mark.parametrize("size", [100, 400_000])
async def test_receive_may_be_cancelled_anywhere(size: int) -> None:
    async with pair() as (near, _, writer):
        payload = bytes(range(200)) * (size // 200) + bytes(size % 200)
        raw = HEADER.pack(size) + payload
        for piece in (raw[:2], raw[2:4], raw[4:90]):
            writer.write(piece)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(near.receive(), 0.05)
        writer.write(raw[90:])
        assert await near.receive() == payload


async def test_a_remote_that_takes_less_than_several_send_is_slow_and_not_lost() -> None:
    async with pair(send_s=0.3) as (near, reader, writer):
        far = FramedStream(REMOTE, reader, writer, max_frame_bytes=MAX, send_s=2.0)
        shrink(near)

        async def send(after_s: float) -> None:
            await asyncio.sleep(after_s)
            for _ in range(2):
                await near.send(bytes(300 * 1024))

        async def receive() -> None:
            for _ in range(6):
                await asyncio.sleep(0.15)
                assert await far.receive() == bytes(300 * 1024)

        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            for after_s in (0.0, 0.1, 0.2):
                group.create_task(send(after_s))
            group.create_task(receive())


async def test_what_was_sent_before_the_end_reaches_a_slow_remote() -> None:
    async with pair(send_s=0.2) as (near, reader, writer):
        far = FramedStream(REMOTE, reader, writer, max_frame_bytes=MAX, send_s=2.0)
        shrink(near)
        for _ in range(4):
            await near.send(bytes(64 * 1024))
        await near.close()
        for _ in range(4):
            await asyncio.sleep(0.1)
            assert await far.receive() == bytes(64 * 1024)
        assert await far.receive() is None


async def test_a_remote_that_does_not_take_the_end_keeps_no_stream_open() -> None:
    async with pair(send_s=0.2) as (near, _, _):
        shrink(near)
        await near.send(bytes(200 * 1024))
        await near.close()
        async with asyncio.timeout(2):
            while near._transport.get_write_buffer_size():  # noqa: ASYNC110  # nobody tells
                await asyncio.sleep(0.01)


async def test_close_and_abort_may_come_in_any_order() -> None:
    closed: list[FramedStream] = []
    left, right = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=left)
    with right:
        stream = FramedStream(REMOTE, reader, writer, max_frame_bytes=MAX, send_s=1.0, on_close=closed.append)
        await stream.close()
        await stream.close()
        stream.abort()
        stream.abort()
        await stream.close()
        assert closed == [stream]
        with pytest.raises(StreamLost):
            await stream.send(b"")
        assert right.recv(10) == HEADER.pack(END)


async def test_large_frames_that_never_end_are_bounded_for_each_peer_and_for_all() -> None:
    mb = 1024 * 1024
    partial = PartialFrames(most_bytes_per_peer=3 * mb, most_bytes=5 * mb)
    async with contextlib.AsyncExitStack() as stack:

        async def begin(
            remote: str, size: int, whole: int = MAX
        ) -> tuple[asyncio.Task[bytes | None], asyncio.StreamWriter]:
            stream, _, writer = await stack.enter_async_context(pair(partial=partial, remote=PeerId(remote)))
            writer.write(HEADER.pack(whole) + bytes(size))
            receiving = asyncio.create_task(stream.receive())
            async with asyncio.timeout(2):
                while partial._held.get(stream, 0) < size and not receiving.done():  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
            return receiving, writer

        greedy, _ = await begin("A", 3 * mb)
        more, _ = await begin("A", 300_000)
        with pytest.raises(StreamLost, match="too many large frames under way"):
            await more
        other, writer = await begin("B", 2 * mb, whole=3 * mb)
        assert not greedy.done()
        third, _ = await begin("C", mb)
        with pytest.raises(StreamLost, match="gave way"):
            await greedy
        assert sum(partial._held.values()) == 3 * mb
        writer.write(bytes(mb))
        assert await other == bytes(3 * mb)
        assert sum(partial._held.values()) == mb
        third.cancel()
        await asyncio.gather(third, return_exceptions=True)
    assert not partial._held, "nothing is held for streams that are gone"


async def test_small_frames_are_not_counted() -> None:
    partial = PartialFrames(0, 0)
    async with pair(partial=partial) as (stream, _, writer):
        writer.write(HEADER.pack(2000) + bytes(2000))
        assert await stream.receive() == bytes(2000)
