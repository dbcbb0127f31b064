"""A slow link without privileges: a TCP proxy that passes bytes on later, and not faster than it is told.

It stands before a peer that announces the proxy's address instead of its own. A libp2p connection serves both peers
whoever dialled it, so the link is slow if it was dialled through the proxy: start the peer that is behind it first.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from swarm.errors import BadRequest, SwarmError

T = TypeVar("T")

HOST = "127.0.0.1"
CHUNK_BYTES = 64 * 1024
BUFFERED_BYTES = 8 * 1024 * 1024
"""On their way in one direction of one connection; then the sender has to wait."""
START_S = 10.0


@dataclass(slots=True)
class Shape:
    """Of each direction; may be changed while the proxy runs."""

    delay_s: float = 0.0
    bytes_per_s: float = 0.0
    """0: no limit."""


class DelayProxy:
    """``with DelayProxy(port, delay_s=0.02) as proxy: connect(proxy.port)``; on a thread of its own."""

    def __init__(self, target_port: int, *, delay_s: float = 0.0, bytes_per_s: float = 0.0) -> None:
        if not (delay_s >= 0 and bytes_per_s >= 0):
            raise BadRequest(f"a link can't have {delay_s} s of delay or {bytes_per_s} bytes a second")
        self.shape = Shape(delay_s, bytes_per_s)
        self.port = 0
        """Where it listens, once it was entered."""
        self._target_port = target_port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="delay proxy", daemon=True)
        self._busy: set[asyncio.Task[None]] = set()

    @classmethod
    def for_new_peer(cls, *, delay_s: float = 0.0, bytes_per_s: float = 0.0) -> DelayProxy:
        """For a peer that is started with :attr:`peer_args`, on a port that is free now."""
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            port = int(probe.getsockname()[1])
        return cls(port, delay_s=delay_s, bytes_per_s=bytes_per_s)

    @property
    def peer_args(self) -> list[str]:
        """For ``swarm-peer serve``: listen behind the proxy, announce the proxy."""
        behind, before = (f"/ip4/{HOST}/tcp/{port}" for port in (self._target_port, self.port))
        return ["--host-maddrs", behind, "--announce-maddrs", before]

    def __enter__(self) -> DelayProxy:
        self._thread.start()
        try:
            self._server = self._do(asyncio.start_server(self._serve, HOST, 0, limit=CHUNK_BYTES))
        except OSError as error:
            self._end()
            raise SwarmError(f"the proxy can't listen: {error}") from None
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._do(self._stop())
        self._end()

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(START_S)

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(START_S)
        self._loop.close()

    async def _stop(self) -> None:
        self._server.close()
        for task in self._busy:
            task.cancel()
        await asyncio.gather(*self._busy, return_exceptions=True)
        await asyncio.sleep(0)  # for the transports to close their sockets

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._busy.add(task)
        try:
            with contextlib.suppress(asyncio.CancelledError):  # by _stop; asyncio's server would print it as an error
                await self._connect(reader, writer)
        finally:
            self._busy.discard(task)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        try:
            far_reader, far_writer = await asyncio.open_connection(HOST, self._target_port, limit=CHUNK_BYTES)
            writers.append(far_writer)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass_on(reader, far_writer))
                group.create_task(self._pass_on(far_reader, writer))
        except* OSError:
            pass  # one side is gone; so is the other, now
        finally:
            for each in writers:
                each.close()  # what was written is still sent

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until the sender's end; then ours, as late as all that was before it."""
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(BUFFERED_BYTES // CHUNK_BYTES)

        async def receive() -> None:
            free_at = 0.0  # when the line has sent what came before
            data = b"?"
            while data:
                data = await reader.read(CHUNK_BYTES)
                rate = self.shape.bytes_per_s
                free_at = max(free_at, self._loop.time()) + (len(data) / rate if rate else 0.0)
                await waiting.put((free_at + self.shape.delay_s, data))

        async def send() -> None:
            data = b"?"
            while data:
                due, data = await waiting.get()
                if (early_s := due - self._loop.time()) > 0:
                    await asyncio.sleep(early_s)
                if data:
                    writer.write(data)
                    await writer.drain()
            writer.write_eof()

        async with asyncio.TaskGroup() as group:
            group.create_task(receive())
            group.create_task(send())
