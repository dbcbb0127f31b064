"""The network of one process: streams of frames to other peers, over its p2pd daemon.

Implements :class:`swarm.transport.Transport` on binary streams of hivemind's p2pd. hivemind's Python side is used to
start the daemon, to speak unary RPC for the DHT and to accept streams; its stream API is not (see ``swarm.streams``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import weakref
from collections import Counter
from types import TracebackType
from typing import Any, Self

from swarm import unix_sockets
from swarm.config import Settings
from swarm.daemon import Daemon, RestartCallback, cancel
from swarm.errors import Busy, Cancelled, SwarmError, Unreachable
from swarm.identity import Identity, is_peer_id
from swarm.streams import FramedStream, PartialFrames
from swarm.transport import CONTROL, LINK, Handler, Stream
from swarm.types import PeerAddress, PeerId

log = logging.getLogger(__name__)

_OF_SESSIONS = (CONTROL, LINK)
"""Within a machine they take the short way. Questions go as they would come from elsewhere: some are about that way."""
_FAREWELL_S = 0.05
"""Between the last end frame and the daemon's end, so that p2pd delivers it."""


class Libp2pTransport:
    """``async with Libp2pTransport(identity, settings, listen=True) as transport``.

    ``listen=False`` is a client: it dials and is never dialled. It knows no peers at first; :meth:`connect` comes
    later. Entering raises what that of :class:`Daemon` raises.
    """

    def __init__(self, identity: Identity, settings: Settings, listen: bool = True) -> None:
        self.identity = identity
        self._settings = settings
        self._listen = listen
        self._near = settings.network.unix_sockets and not settings.network.announce_maddrs
        """Go past the daemon within this machine."""
        self._daemon = Daemon(identity, settings, listen=listen, accept=self._accept, on_death=self._drop_streams)
        self._closing = False
        self._exit = contextlib.AsyncExitStack()
        self._handlers: dict[str, Handler] = {}
        self._streams: set[FramedStream] = set()
        self._sockets: weakref.WeakSet[FramedStream] = weakref.WeakSet()
        """The streams, and those that are closed but linger; all must be gone before the event loop is."""
        limits = settings.limits
        self._partial = PartialFrames(limits.max_partial_bytes_per_peer, limits.max_partial_bytes)
        self._incoming: Counter[PeerId] = Counter()
        """Streams that each remote has opened to us."""
        self._tasks: set[asyncio.Task[None]] = set()
        """One for each incoming stream."""

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._daemon)
            stack.push_async_callback(self._close_streams)
            if self._listen and self._near:
                peer_id, open_s = self.identity.peer_id, self._settings.timeouts.open_s
                await stack.enter_async_context(unix_sockets.listening(peer_id, self._accept_near, open_s))
            self._exit = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._exit.aclose()

    # --- Transport ---------------------------------------------------------------------------------------------------

    @property
    def local(self) -> PeerAddress:
        """Own peer id and the addresses others can dial, each with ``/p2p/ID``; none for a client."""
        return self._daemon.local

    async def ready(self) -> int:
        if self._closing:
            raise Cancelled("this process has left the swarm")
        return await self._daemon.ready()

    async def open(self, peer: PeerAddress, protocol: str) -> Stream:
        """As :meth:`Transport.open`; also raises ``Busy`` when ``limits.max_streams`` are open here.

        To a connected peer this costs no round trip (libp2p negotiates lazily). So on a peer that has just frozen or
        died it succeeds, and the deadline of the first answer tells; a full peer drops the stream (``StreamLost``).
        """
        if self._closing:
            raise Unreachable("the transport is being closed")
        if len(self._streams) >= self._settings.limits.max_streams:
            raise Busy(f"limits.max_streams ({self._settings.limits.max_streams}) streams are open")
        if peer.peer_id == self.identity.peer_id:
            return await self._open_to_self(protocol)
        streams = None
        if self._near and protocol in _OF_SESSIONS:
            streams = await unix_sockets.connect(peer.peer_id, self.identity.peer_id, protocol)
        reader, writer = streams or await self._daemon.dial(peer, protocol)
        return self._stream(peer.peer_id, reader, writer)

    async def serve(self, protocol: str, handler: Handler) -> None:
        self._handlers[protocol] = handler
        await self._daemon.serve(protocol)

    # --- beyond the Protocol -----------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """False between the death of p2pd and its restart, and after the end."""
        return self._daemon.alive and not self._closing

    @property
    def p2p(self) -> Any:
        """hivemind's ``P2P``, for ``swarm.dht`` only; a new one after each restart."""
        return self._daemon.p2p

    @property
    def daemon_pid(self) -> int:
        return self._daemon.pid

    @property
    def restarts(self) -> int:
        """Of p2pd."""
        return self._daemon.restarts

    @property
    def streams(self) -> int:
        """Open streams, both directions."""
        return len(self._streams)

    async def connect(self, peer: PeerAddress) -> None:
        """Dial ``peer`` unless connected; opens no stream. Raises :class:`Unreachable` within ``connect_s``."""
        _, writer = await self._daemon.dial(peer, None)
        writer.close()

    def on_restart(self, callback: RestartCallback) -> None:
        """``await callback()`` after each restart of p2pd, when the handlers are registered again."""
        self._daemon.on_restart(callback)

    # --- streams -----------------------------------------------------------------------------------------------------

    async def _open_to_self(self, protocol: str) -> Stream:
        """For a peer that owns a session whose route leads through itself: p2pd doesn't dial its own id."""
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        other_reader, other_writer = await asyncio.open_unix_connection(sock=theirs)
        await self._accept(self.identity.peer_id, "", protocol, other_reader, other_writer)
        return self._stream(self.identity.peer_id, reader, writer)

    async def _accept_near(
        self, remote: PeerId, protocol: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await self._accept(remote, "", protocol if protocol in _OF_SESSIONS else "", reader, writer)

    def _stream(
        self, remote: PeerId, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, remote_address: str = ""
    ) -> FramedStream:
        stream = FramedStream(
            remote,
            reader,
            writer,
            max_frame_bytes=self._settings.limits.max_frame_bytes,
            send_s=self._settings.timeouts.send_s,
            partial=self._partial,
            remote_address=remote_address,
            on_close=self._streams.discard,
        )
        self._streams.add(stream)
        self._sockets.add(stream)
        return stream

    async def _accept(
        self,
        remote: PeerId,
        remote_address: str,
        protocol: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Have an incoming stream handled, in a task that ends with the transport; or drop it."""
        handler = self._handlers.get(protocol)
        limits = self._settings.limits
        full = len(self._streams) >= limits.max_streams or self._incoming[remote] >= limits.max_streams_per_peer
        if handler is None or full or self._closing or not is_peer_id(remote):
            if full:
                log.info("refused a stream of peer %s: too many are open", remote)
            writer.transport.abort()
            return
        self._incoming[remote] += 1
        stream = self._stream(remote, reader, writer, remote_address)
        task = asyncio.create_task(self._handle(handler, stream, protocol))
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._handled(task, stream))

    async def _handle(self, handler: Handler, stream: FramedStream, protocol: str) -> None:
        try:
            await handler(stream)
            await stream.close()
        except SwarmError as error:
            log.info("stream %s of peer %s ended: %s", protocol, stream.remote, error)
        except Exception:  # the outermost edge: a bug in one handler must not hurt any other stream
            log.exception("handler of %s failed; stream of peer %s is dropped", protocol, stream.remote)

    def _handled(self, task: asyncio.Task[None], stream: FramedStream) -> None:
        self._tasks.discard(task)
        if stream in self._streams:
            stream.abort()
        self._incoming[stream.remote] -= 1
        if not self._incoming[stream.remote]:
            del self._incoming[stream.remote]

    def _drop_streams(self) -> None:
        """Their daemon is dead."""
        for stream in list(self._streams):
            stream.abort()

    async def _close_streams(self) -> None:
        self._closing = True
        await cancel(self._tasks)
        if self._sockets:
            await asyncio.sleep(_FAREWELL_S)
        for stream in list(self._sockets):
            stream.abort()
