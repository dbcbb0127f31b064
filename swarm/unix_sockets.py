"""Streams between processes of one user on one machine: Unix sockets, which the p2p daemons don't stand between.

Through two daemons a frame of a decode step waits for two more processes to wake up, and is encrypted for nobody. As
NCCL goes past the network between cards of one machine, sessions go past the daemons where both ends are here.

A peer listens at an abstract address made of its id, which only the same network namespace can reach. Either end asks
the kernel who the other one is, and goes on only with its own user: whom processes of the same user say they are is
believed, since they could read each other's keys and memory anyway. A line says who comes, and for which protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable

from swarm.awake import timeout_awake
from swarm.daemon import cancel
from swarm.types import PeerId

log = logging.getLogger(__name__)

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Accept = Callable[[PeerId, str, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
"""Takes an incoming stream: the remote, the protocol, what it sends, what it is sent."""

_CREDENTIALS = struct.Struct("3i")
"""Process, user and group of the other end, see unix(7)."""
_BACKLOG = 128
_supported = sys.platform == "linux"
"""Others have no abstract addresses; a file in their place may outlive its process, and be reached from containers."""


@contextlib.asynccontextmanager
async def listening(peer_id: PeerId, accept: Accept, deadline_s: float) -> AsyncIterator[None]:
    """Take streams of other processes here; who says nothing for ``deadline_s`` is dropped.

    Where that can't be, streams come through the daemon, as from elsewhere.
    """
    arriving: set[asyncio.Task[None]] = set()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with timeout_awake(deadline_s):
                remote, protocol = await _introduction(reader, writer)
        except (OSError, ValueError, TimeoutError) as error:
            log.info("a process of this machine was not let in: %s", str(error) or type(error).__name__)
            writer.transport.abort()
        except asyncio.CancelledError:
            writer.transport.abort()
            raise
        else:
            await accept(remote, protocol, reader, writer)

    def arrived(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not server.is_serving():  # it came as this was ending
            writer.transport.abort()
            return
        task = asyncio.create_task(take(reader, writer))
        arriving.add(task)
        task.add_done_callback(arriving.discard)

    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(cancel, arriving)
        try:
            if _supported:
                listener = stack.enter_context(socket.socket(socket.AF_UNIX))
                listener.bind(_address(peer_id))
                server = await asyncio.start_unix_server(arrived, sock=listener, backlog=_BACKLOG, start_serving=False)
                stack.callback(server.close)
                await server.start_serving()
        except OSError as error:
            log.info("processes of this machine come through the p2p daemon: %s", error.strerror or error)
        yield


async def connect(peer_id: PeerId, own_id: PeerId, protocol: str) -> Streams | None:
    """A stream to that peer, as ``own_id``; None unless it is on this machine, and listens as this very user.

    Costs one system call where there is no such peer. Nothing is waited for: that the other end is frozen is found
    out as on any stream.
    """
    if not _supported:
        return None
    try:
        with contextlib.ExitStack() as unless_connected:
            connection = unless_connected.enter_context(socket.socket(socket.AF_UNIX))
            connection.setblocking(False)
            connection.connect(_address(peer_id))
            if not _same_user(connection):
                raise PermissionError("it is another user's")
            reader, writer = await asyncio.open_unix_connection(sock=connection)
            unless_connected.pop_all()
    except OSError:
        return None
    writer.write(f"{own_id} {protocol}\n".encode())
    return reader, writer


async def _introduction(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[PeerId, str]:
    """Who has come, and for which protocol. Raises ``OSError``; ``ValueError`` for what is not said as we do."""
    if not _same_user(writer.get_extra_info("socket")):
        raise PermissionError("it is another user's")
    remote, protocol = (await reader.readline()).decode("ascii").split()
    return PeerId(remote), protocol


def _address(peer_id: PeerId) -> str:
    return f"\0swarm/{peer_id}"


def _same_user(connection: socket.socket) -> bool:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(credentials)
    return bool(user == os.geteuid())
