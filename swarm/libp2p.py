"""The network of one process: a p2pd daemon, streams of frames to other peers, and its restart when it dies.

Implements :class:`swarm.transport.Transport` on binary streams of hivemind's p2pd. hivemind's Python side is used to
start the daemon, to speak unary RPC for the DHT and to accept streams; its stream API is not (see ``swarm.streams``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import socket
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from types import TracebackType
from typing import Any, Self

from multiaddr import Multiaddr

from swarm import _hivemind, multiaddrs
from swarm.config import Settings
from swarm.daemon import reserved_ports, runtime_folder
from swarm.errors import Busy, Internal, SwarmError, Unreachable
from swarm.identity import Identity, is_peer_id
from swarm.streams import FramedStream
from swarm.transport import Handler, Stream
from swarm.types import PeerAddress, PeerId

_p2p = _hivemind.load("hivemind.p2p")
_bindings = _hivemind.load("hivemind.p2p.p2p_daemon_bindings.utils")
_pb = _hivemind.load("hivemind.proto.p2pd_pb2")

log = logging.getLogger(__name__)

_STOP_S = 2.0
"""How long p2pd may take to end after SIGTERM before it is killed."""
_FAREWELL_S = 0.05
"""Between the last end frame and the daemon's end, so that p2pd delivers it."""
_RESTART_FIRST_S = 0.2
_RESTART_MOST_S = 15.0
"""Waits between attempts to restart p2pd: doubled from the first to the longest, for ever."""

RestartCallback = Callable[[], Awaitable[None]]


class Libp2pTransport:
    """``async with Libp2pTransport(identity, settings, listen=True) as transport``.

    ``listen=False`` is a client: it dials and is never dialled. Starts with no peers at all (p2pd would end itself if
    the first ones don't answer, H16); :meth:`connect` comes later. Entering raises ``PortInUse``, ``ConfigError``,
    ``Unreachable`` (the daemon does not start).
    """

    def __init__(self, identity: Identity, settings: Settings, listen: bool = True) -> None:
        self.identity = identity
        self._settings = settings
        self._listen = listen
        self._exit = contextlib.AsyncExitStack()
        self._p2p: Any = None
        self._alive = False
        self._usable = asyncio.Event()
        self._handlers: dict[str, Handler] = {}
        self._streams: set[FramedStream] = set()
        self._sockets: weakref.WeakSet[FramedStream] = weakref.WeakSet()
        """The streams, and those that are closed but linger; all must be gone before the event loop is."""
        self._incoming: Counter[PeerId] = Counter()
        """Streams that each remote has opened to us."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._callbacks: list[RestartCallback] = []
        self._local = PeerAddress(identity.peer_id)
        self.restarts = 0

    @property
    def local(self) -> PeerAddress:
        """Own peer id and the addresses others can dial, each with ``/p2p/ID``; none for a client."""
        return self._local

    @property
    def alive(self) -> bool:
        """False between the death of p2pd and its restart, and after the end."""
        return self._alive

    async def ready(self) -> int:
        try:
            async with asyncio.timeout(self._settings.timeouts.daemon_start_s):
                await self._usable.wait()
        except TimeoutError:
            raise Unreachable("the own p2p daemon is down and did not come back") from None
        return self.restarts

    @property
    def p2p(self) -> Any:
        """hivemind's ``P2P``, for ``swarm.dht`` only; a new one after each restart."""
        if self._p2p is None:
            raise Unreachable("the p2p daemon is not running")
        return self._p2p

    @property
    def daemon_pid(self) -> int:
        return int(self.p2p._child.pid)

    @property
    def streams(self) -> int:
        """Open streams, both directions."""
        return len(self._streams)

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            folder = stack.enter_context(runtime_folder())
            network = self._settings.network
            self._host_maddrs = stack.enter_context(reserved_ports(network.host_maddrs if self._listen else ()))
            for text in network.announce_maddrs:
                multiaddrs.peer_address(f"{text}/p2p/{self.identity.peer_id}")  # raises ConfigError
            self._key_file = self.identity.private_key_file(folder)
            # a subclass, because hivemind puts its sockets where everybody can connect to them
            members: dict[str, object] = {"_UNIX_SOCKET_PREFIX": f"/unix{folder}/"}
            # Ctrl-C in a terminal goes to the whole process group: in it, p2pd would end before a client has closed
            # its sessions. A peer's p2pd stays: who kills or freezes a peer's group means both.
            if not self._listen and (setsid := shutil.which("setsid")) is not None:
                members["_make_process_args"] = staticmethod(partial(_p2p.P2P._make_process_args, setsid))
            self._p2p_class = type("SwarmP2P", (_p2p.P2P,), members)
            stack.push_async_callback(self._stop)
            await self._start()
            self._usable.set()
            watch = asyncio.create_task(self._watch(), name="watch p2pd")
            stack.push_async_callback(_cancel, [watch])
            self._exit = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._exit.aclose()

    # --- Transport ---------------------------------------------------------------------------------------------------

    async def open(self, peer: PeerAddress, protocol: str) -> Stream:
        """As :meth:`Transport.open`; also raises ``Busy`` when ``limits.max_streams`` are open here.

        To a connected peer this costs no round trip (libp2p negotiates lazily). So on a peer that has just frozen or
        died it succeeds, and the deadline of the first answer tells; a full peer drops the stream (``StreamLost``).
        """
        if len(self._streams) >= self._settings.limits.max_streams:
            raise Busy(f"limits.max_streams ({self._settings.limits.max_streams}) streams are open")
        if peer.peer_id == self.identity.peer_id:
            return await self._open_to_self(protocol)
        reader, writer = await self._ask(peer, protocol)
        return self._stream(peer.peer_id, reader, writer)

    async def serve(self, protocol: str, handler: Handler) -> None:
        registered = protocol in self._handlers  # p2pd takes a protocol once; it is we who look up the handler
        self._handlers[protocol] = handler
        if not registered:
            await self._register(protocol)

    # --- beyond the Protocol -----------------------------------------------------------------------------------------

    async def connect(self, peer: PeerAddress) -> None:
        """Dial ``peer`` unless connected; opens no stream. Raises :class:`Unreachable` within ``connect_s``."""
        _, writer = await self._ask(peer, None)
        writer.close()

    def on_restart(self, callback: RestartCallback) -> None:
        """``await callback()`` after each restart of p2pd, when the handlers are registered again."""
        self._callbacks.append(callback)

    # --- streams -----------------------------------------------------------------------------------------------------

    async def _ask(self, peer: PeerAddress, protocol: str | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """CONNECT and then STREAM_OPEN on one control connection; p2pd does nothing for CONNECT when connected."""
        if not is_peer_id(peer.peer_id):
            raise Unreachable(f"{peer.peer_id!r} is no peer id")
        addresses = _dialable(peer)
        raw_id = _p2p.PeerID.from_base58(peer.peer_id).to_bytes()
        writer: asyncio.StreamWriter | None = None
        connect_s = self._settings.timeouts.connect_s
        try:
            async with asyncio.timeout(connect_s):
                if not self._alive:
                    raise Unreachable("the own p2p daemon is down; it is being restarted")
                path = self._p2p.daemon_listen_maddr["unix"]
                reader, writer = await asyncio.open_unix_connection(path)
                if addresses or protocol is None:
                    request = _pb.ConnectRequest(peer=raw_id, addrs=[address.to_bytes() for address in addresses])
                    await _call(reader, writer, _pb.Request(type=_pb.Request.CONNECT, connect=request))
                if protocol is not None:
                    request = _pb.StreamOpenRequest(peer=raw_id, proto=[protocol])
                    await _call(reader, writer, _pb.Request(type=_pb.Request.STREAM_OPEN, streamOpen=request))
            return reader, writer
        except BaseException as error:
            if writer is not None:
                writer.transport.abort()
            if isinstance(error, Exception):
                raise translate(error, peer, connect_s) from None
            raise

    async def _open_to_self(self, protocol: str) -> Stream:
        """For a peer that owns a session whose route leads through itself: p2pd doesn't dial its own id."""
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        other_reader, other_writer = await asyncio.open_unix_connection(sock=theirs)
        task = asyncio.create_task(self._take(self.identity.peer_id, "", protocol, other_reader, other_writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return self._stream(self.identity.peer_id, reader, writer)

    def _stream(
        self, remote: PeerId, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, remote_address: str = ""
    ) -> FramedStream:
        stream = FramedStream(
            remote,
            reader,
            writer,
            max_frame_bytes=self._settings.limits.max_frame_bytes,
            send_s=self._settings.timeouts.send_s,
            remote_address=remote_address,
            on_close=self._streams.discard,
        )
        self._streams.add(stream)
        self._sockets.add(stream)
        return stream

    async def _register(self, protocol: str) -> None:
        try:
            async with asyncio.timeout(self._settings.timeouts.open_s):
                await self.p2p.add_binary_stream_handler(protocol, self._accept)
        except Exception as error:
            raise translate(error, self._local, self._settings.timeouts.open_s) from error

    async def _accept(self, info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One incoming stream, in a task of its own that hivemind's listener has made."""
        await self._take(PeerId(info.peer_id.to_base58()), str(info.addr), info.proto, reader, writer)

    async def _take(
        self,
        remote: PeerId,
        remote_address: str,
        protocol: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        handler = self._handlers.get(protocol)
        limits = self._settings.limits
        full = len(self._streams) >= limits.max_streams or self._incoming[remote] >= limits.max_streams_per_peer
        if handler is None or full or not is_peer_id(remote):
            if full:
                log.info("refused a stream of peer %s: too many are open", remote)
            writer.transport.abort()
            return
        task = asyncio.current_task()
        assert task is not None  # a coroutine always runs in one
        self._tasks.add(task)
        self._incoming[remote] += 1
        stream = self._stream(remote, reader, writer, remote_address)
        try:
            await handler(stream)
            await stream.close()
        except SwarmError as error:
            log.info("stream %s of peer %s ended: %s", protocol, remote, error)
        except Exception:  # the outermost edge: a bug in one handler must not hurt any other stream
            log.exception("handler of %s failed; stream of peer %s is dropped", protocol, remote)
        finally:
            if stream in self._streams:
                stream.abort()
            self._incoming[remote] -= 1
            if not self._incoming[remote]:
                del self._incoming[remote]
            self._tasks.discard(task)

    # --- the daemon --------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        network, timeouts = self._settings.network, self._settings.timeouts
        try:
            p2p = await self._p2p_class.create(  # type: ignore[attr-defined]
                identity_path=str(self._key_file),
                check_if_identity_free=False,  # knows RSA only, and needs a second daemon; our lock file does it
                host_maddrs=self._host_maddrs or None,
                announce_maddrs=network.announce_maddrs or None,
                no_listen=not self._listen,
                dht_mode="server" if self._listen else "client",
                nat_port_map=network.nat_port_map,
                auto_nat=network.auto_nat,
                use_relay=network.use_relay,
                use_auto_relay=network.use_relay,
                startup_timeout=timeouts.daemon_start_s,
            )
        except Exception as error:
            raise translate(error, self._local, timeouts.daemon_start_s) from error
        self._p2p = p2p
        if p2p.peer_id.to_base58() != self.identity.peer_id:
            raise Internal(f"p2pd runs as {p2p.peer_id}, not as {self.identity.peer_id}")
        suffix = f"/p2p/{self.identity.peer_id}"
        visible = sorted(map(str, p2p._visible_maddrs), key=multiaddrs.is_loopback)  # what is of use to all comes first
        self._local = PeerAddress(self.identity.peer_id, tuple(f"{maddr}{suffix}" for maddr in visible))
        self._alive = True

    async def _stop(self) -> None:
        self._alive = False
        await _cancel(self._tasks)
        if self._sockets:
            await asyncio.sleep(_FAREWELL_S)
        for stream in list(self._sockets):
            stream.abort()
        if self._p2p is not None:
            await self._end_daemon()

    async def _end_daemon(self) -> None:
        p2p, self._p2p = self._p2p, None
        control = p2p._client.control
        tasks = [task for task in (p2p._listen_task, p2p._reader_task, control._read_task, control._write_task) if task]
        try:
            async with asyncio.timeout(_STOP_S):
                await p2p.shutdown()
        except TimeoutError:  # stopped (SIGSTOP) or stuck
            with contextlib.suppress(ProcessLookupError):
                p2p._child.kill()
            await p2p._child.wait()
        except Exception:  # must not end the watch; what is left of the old daemon is dead or will be
            log.exception("ending p2pd failed")
        await _cancel(tasks)  # hivemind cancels them and doesn't wait

    async def _watch(self) -> None:
        """hivemind doesn't notice that its daemon died, and calls hang for ever (H3)."""
        while True:
            await self._daemon_end()
            self._alive = False
            self._usable.clear()
            log.error("p2pd (pid %d) ended; restarting it with the same identity and ports", self.daemon_pid)
            for stream in list(self._streams):
                stream.abort()
            await self._end_daemon()
            await self._restart()

    async def _daemon_end(self) -> None:
        """Returns when the daemon is dead; one that lives but no longer answers is killed first."""
        child, misses = self._p2p._child, 0
        end = asyncio.ensure_future(child.wait())
        try:
            while not end.done():
                await asyncio.wait({end}, timeout=self._settings.discovery.ping_period_s)
                misses = 0 if end.done() or await self._daemon_answers() else misses + 1
                if misses >= 2:  # twice, because a blocked event loop looks the same
                    log.error("p2pd (pid %d) does not answer; killing it", child.pid)
                    with contextlib.suppress(ProcessLookupError):
                        child.kill()
                    await end
        finally:
            await _cancel([end])

    async def _daemon_answers(self) -> bool:
        try:
            async with asyncio.timeout(self._settings.timeouts.info_s):
                reader, writer = await asyncio.open_unix_connection(self._p2p.daemon_listen_maddr["unix"])
                try:
                    await _call(reader, writer, _pb.Request(type=_pb.Request.IDENTIFY))
                finally:
                    writer.close()
        except (OSError, EOFError, SwarmError):  # TimeoutError is an OSError, IncompleteReadError an EOFError
            return False
        return True

    async def _restart(self) -> None:
        wait_s = _RESTART_FIRST_S
        while True:
            try:
                await self._start()
                for protocol in list(self._handlers):
                    await self._register(protocol)
                break
            except Exception as error:  # whatever it is, without a daemon this process is nothing: try again for ever
                self._alive = False
                if self._p2p is not None:
                    await self._end_daemon()
                log.error("can't restart p2pd, next attempt in %.1f s: %s", wait_s, error)
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, _RESTART_MOST_S)
        self.restarts += 1
        self._usable.set()
        log.warning("p2pd runs again (pid %d)", self.daemon_pid)
        for callback in self._callbacks:
            try:
                async with asyncio.timeout(self._settings.timeouts.daemon_start_s):
                    await callback()
            except Exception:  # one that can't recover must not keep the others from it
                log.exception("a callback failed after the restart of p2pd")


def translate(error: Exception, peer: PeerAddress, deadline_s: float) -> SwarmError:
    """hivemind's errors, told apart by type first and text second (H6); unknown ones are "unreachable, retryable"."""
    if isinstance(error, SwarmError):
        return error
    text = str(error) or type(error).__name__
    if isinstance(error, TimeoutError):
        return Unreachable(f"peer {peer.peer_id} did not answer within {deadline_s:g} s")
    if isinstance(error, ConnectionError | FileNotFoundError | EOFError):
        return Unreachable(f"the own p2p daemon is down ({text})")
    if "protocols not supported" in text:
        return Unreachable(f"peer {peer.peer_id} does not speak this protocol")
    if "routing: not found" in text or "no addresses" in text:
        return Unreachable(f"nobody knows an address of peer {peer.peer_id}")
    # p2pd names each address that it dialled in a line of its own; what went wrong comes last
    causes = dict.fromkeys(line.rpartition(": ")[2] for line in text.splitlines() if line.lstrip().startswith("* ["))
    return Unreachable(f"can't reach peer {peer.peer_id}: {', '.join(causes) or text}")


def _dialable(peer: PeerAddress) -> list[Multiaddr]:
    """Checked addresses, peer ids cut off. Raises :class:`Unreachable` if there are some but none is good."""
    good: list[Multiaddr] = []
    bad: list[str] = []
    for text in peer.multiaddrs:
        try:
            address, peer_id = multiaddrs.split(text)
            if peer_id not in (None, peer.peer_id):
                raise ValueError(f"{text!r} is the address of another peer")
            good.append(Multiaddr(address))
        except ValueError as error:
            bad.append(str(error))
    if bad and not good:
        raise Unreachable(f"no usable address of peer {peer.peer_id}: {'; '.join(bad)}")
    return good


async def _call(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: Any) -> Any:
    """One request to p2pd on a control connection; raises :class:`Unreachable` with the daemon's words."""
    await _bindings.write_pbmsg(writer, request)
    response = _pb.Response()
    await _bindings.read_pbmsg_safe(reader, response)
    _bindings.raise_if_failed(response)
    return response


async def _cancel(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel and wait, so that no task outlives its owner."""
    pending = list(tasks)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
