"""Streams within a machine: who gets in, as whom, and what happens to everybody else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from swarm import awake, unix_sockets
from swarm.identity import Identity
from swarm.transport import LINK
from swarm.types import PeerId

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="abstract Unix sockets are Linux's")

HERE, THERE = Identity.ephemeral().peer_id, Identity.ephemeral().peer_id
ADDRESS = unix_sockets._address(THERE)
VISITOR = f"""
import os, socket
os.setuid(65534)
with socket.socket(socket.AF_UNIX) as connection:
    connection.settimeout(5)
    connection.connect({ADDRESS!r})
    try:
        connection.sendall(b"{HERE} {LINK}\\n")
        print("got", connection.recv(1))
    except ConnectionError:
        print("dropped")
"""
SQUATTER = f"""
import os, socket, sys
os.setuid(65534)
listener = socket.socket(socket.AF_UNIX)
listener.bind({ADDRESS!r})
listener.listen()
print("listens", flush=True)
sys.stdin.read()
"""
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


@dataclass
class Listener:
    deadline_s: float = 2.0
    accepted: list[tuple[PeerId, str]] = field(default_factory=list)

    async def __call__(
        self, remote: PeerId, protocol: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.accepted.append((remote, protocol))
        writer.write(await reader.readexactly(5))
        writer.close()


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    found = Listener()
    async with unix_sockets.listening(THERE, found, found.deadline_s):
        yield found


@contextlib.asynccontextmanager
async def _python(code: str) -> AsyncIterator[asyncio.subprocess.Process]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdin=pipe, stdout=pipe)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def _connected() -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.setblocking(False)
    connection.connect(ADDRESS)
    return connection


async def test_a_stream_comes_from_whom_it_says_for_its_protocol(listener: Listener) -> None:
    streams = await unix_sockets.connect(THERE, HERE, LINK)
    assert streams is not None
    reader, writer = streams
    writer.write(b"frame")  # nothing has to be waited for
    assert await reader.read() == b"frame"
    assert listener.accepted == [(HERE, LINK)]
    writer.close()


async def test_who_is_not_on_this_machine_is_reached_through_the_daemon(listener: Listener) -> None:
    assert await unix_sockets.connect(Identity.ephemeral().peer_id, HERE, LINK) is None


async def test_it_is_gone_with_its_process() -> None:
    async with unix_sockets.listening(THERE, Listener(), 2.0):
        pass
    assert await unix_sockets.connect(THERE, HERE, LINK) is None


async def test_a_name_that_is_taken_is_no_error(listener: Listener) -> None:
    async with unix_sockets.listening(THERE, Listener(), 2.0):
        pass
    streams = await unix_sockets.connect(THERE, HERE, LINK)
    assert streams is not None, "the first one is still there"
    streams[1].close()


@only_root
async def test_processes_of_other_users_are_dropped(listener: Listener) -> None:
    async with _python(VISITOR) as visitor:
        out, _ = await asyncio.wait_for(visitor.communicate(), 20)
    assert out in (b"dropped\n", b"got b''\n")
    assert listener.accepted == []


@only_root
async def test_a_peer_of_another_user_is_reached_through_the_daemon() -> None:
    async with _python(SQUATTER) as squatter:
        assert squatter.stdout is not None
        assert await asyncio.wait_for(squatter.stdout.readline(), 20) == b"listens\n"
        assert await unix_sockets.connect(THERE, HERE, LINK) is None


@pytest.mark.parametrize(
    "said", [b"\n", b"one\n", b"one two three\n", b"\xff\xfe x\n", b"x" * 100_000, b"no end of line"]
)
async def test_who_does_not_say_who_it_is_is_dropped(listener: Listener, said: bytes) -> None:
    reader, writer = await asyncio.open_unix_connection(sock=_connected())
    writer.write(said)
    writer.write_eof()
    with contextlib.suppress(ConnectionResetError):  # it had more to say
        assert await asyncio.wait_for(reader.read(), 5) == b""
    assert listener.accepted == []
    writer.close()


async def test_who_spoke_while_this_process_stood_still_is_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awake, "TICK_S", 0.05)
    listener = Listener()
    async with unix_sockets.listening(THERE, listener, 0.3):
        reader, writer = await asyncio.open_unix_connection(sock=_connected())
        await asyncio.sleep(0.1)
        writer.write(f"{HERE} {LINK}\nframe".encode())
        time.sleep(0.6)  # noqa: ASYNC251
        assert await asyncio.wait_for(reader.read(), 5) == b"frame"
    assert listener.accepted == [(HERE, LINK)]
    writer.close()


async def test_who_says_nothing_is_dropped_in_time() -> None:
    listener = Listener()
    async with unix_sockets.listening(THERE, listener, 0.05):
        reader, writer = await asyncio.open_unix_connection(sock=_connected())
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
    assert listener.accepted == []


async def test_the_end_does_not_wait_for_who_says_nothing() -> None:
    async with unix_sockets.listening(THERE, Listener(), 60.0):
        reader, writer = await asyncio.open_unix_connection(sock=_connected())
        await asyncio.sleep(0)  # it may have been taken or not
    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()
    assert len(asyncio.all_tasks()) == 1
