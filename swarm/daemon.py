"""The p2pd daemon of one process: started, watched, and started again when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from types import TracebackType
from typing import Any, Self

from swarm import _hivemind, multiaddrs
from swarm.awake import timeout_awake
from swarm.config import Settings
from swarm.daemon_requests import dial, is_connected, own_addresses, translate
from swarm.errors import ConfigError, Internal, ProtocolError, Unreachable
from swarm.identity import Identity
from swarm.knock import knock
from swarm.premises import reserved_ports, runtime_folder
from swarm.types import PeerAddress, PeerId

_p2p = _hivemind.load("hivemind.p2p")

log = logging.getLogger(__name__)

_STOP_S = 2.0
"""How long p2pd may take to end after SIGTERM before it is killed."""
_RESTART_FIRST_S = 0.2
_RESTART_MOST_S = 15.0
"""Waits between attempts to restart p2pd: doubled from the first to the longest, for ever."""
_MOST_MISSED = 256
"""Peers of which it is remembered that they could not be reached; the first of them is forgotten first."""

Accept = Callable[[PeerId, str, str, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
"""Takes an incoming stream: the remote, its address, the protocol, what it sends, what it is sent."""
RestartCallback = Callable[[], Awaitable[None]]


class Daemon:
    """``async with Daemon(identity, settings, listen=True, accept=..., on_death=...) as daemon``.

    Starts with no peers at all: p2pd would end itself if the first ones don't answer. Entering raises
    ``PortInUse``, ``ConfigError``, ``Unreachable`` (it does not start).
    """

    def __init__(
        self,
        identity: Identity,
        settings: Settings,
        *,
        listen: bool,
        accept: Accept,
        on_death: Callable[[], None],
    ) -> None:
        """``accept`` is awaited in a task of each stream; ``on_death`` is called when p2pd is found dead."""
        self._identity = identity
        self._settings = settings
        self._listen = listen
        self._accept = accept
        self._on_death = on_death
        self._exit = contextlib.AsyncExitStack()
        self._p2p: Any = None
        self._usable = asyncio.Event()
        self._protocols: list[str] = []
        self._callbacks: list[RestartCallback] = []
        self._missed: dict[PeerId, None] = {}
        """Peers that could not be reached when they were last dialled."""
        self.alive = False
        """False between the death of p2pd and its restart, and after the end."""
        self.local = PeerAddress(identity.peer_id)
        """Own peer id and the addresses others can dial, each with ``/p2p/ID``; none for a client. They change when
        this machine's network does, and when a router or a relay lets others in."""
        self.restarts = 0

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            folder = self._folder = stack.enter_context(runtime_folder())
            network = self._settings.network
            self._host_maddrs = stack.enter_context(reserved_ports(network.host_maddrs if self._listen else ()))
            self._announce_maddrs = [_announced(text) for text in network.announce_maddrs]
            # a subclass, because hivemind puts its sockets where everybody can connect to them
            members: dict[str, object] = {"_UNIX_SOCKET_PREFIX": f"/unix{folder}/"}
            # Ctrl-C in a terminal goes to the whole process group. In it, p2pd would end before a client has closed its
            # sessions, or a peer has handed its own over. It ends when this process is gone, however that went.
            if (setsid := shutil.which("setsid")) is not None:
                members["_make_process_args"] = staticmethod(partial(_p2p.P2P._make_process_args, setsid))
            self._p2p_class = type("SwarmP2P", (_p2p.P2P,), members)
            stack.push_async_callback(self._end)
            await self._start()
            self._usable.set()
            watch = asyncio.create_task(self._watch(), name="watch p2pd")
            stack.push_async_callback(cancel, [watch])
            self._exit = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.alive = False
        await self._exit.aclose()

    @property
    def p2p(self) -> Any:
        """hivemind's ``P2P``; a new one after each restart. Raises :class:`Unreachable` while there is none."""
        if self._p2p is None:
            raise Unreachable("the p2p daemon is not running")
        return self._p2p

    @property
    def pid(self) -> int:
        return int(self.p2p._child.pid)

    @property
    def _socket(self) -> str:
        return str(self._p2p.daemon_listen_maddr["unix"])

    async def ready(self) -> int:
        """As :meth:`swarm.transport.Transport.ready`."""
        try:
            async with asyncio.timeout(self._settings.timeouts.daemon_start_s):
                await self._usable.wait()
        except TimeoutError:
            raise Unreachable("the own p2p daemon is down and did not come back") from None
        return self.restarts

    async def dial(self, peer: PeerAddress, protocol: str | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A stream to ``peer``, or with no ``protocol`` just a connection. Raises :class:`Unreachable` within
        ``timeouts.connect_s``."""
        connect_s = self._settings.timeouts.connect_s
        try:
            async with timeout_awake(connect_s):
                if peer.peer_id in self._missed:
                    await self._look_for(peer)
                if not self.alive:
                    raise Unreachable("the own p2p daemon is down; it is being restarted")
                streams = await dial(self._socket, peer, protocol, connect_s)
        except (Unreachable, TimeoutError) as error:
            self._missed[peer.peer_id] = None
            if len(self._missed) > _MOST_MISSED:
                del self._missed[next(iter(self._missed))]
            raise translate(error, peer, connect_s) from None
        self._missed.pop(peer.peer_id, None)
        return streams

    async def _look_for(self, peer: PeerAddress) -> None:
        """Raises :class:`Unreachable` unless somebody listens there, or the peer has connected to us.

        After a dial that failed, p2pd does not even try for a while, and for longer after each further one, up to
        minutes (libp2p's back-off): a peer that is back would be kept waiting. So p2pd dials only who may be there.
        """
        connect_s = self._settings.timeouts.connect_s
        if not self.alive or await is_connected(self._socket, peer, connect_s):
            return
        try:
            await knock(peer, connect_s)
        except ProtocolError:
            return  # other addresses may be good
        except Unreachable as error:
            raise Unreachable(f"can't reach peer {peer.peer_id}: {error.message}") from None

    async def serve(self, protocol: str) -> None:
        """Accept its streams, after each restart, too."""
        if protocol not in self._protocols:  # p2pd takes a protocol once
            self._protocols.append(protocol)
            if self._usable.is_set():  # else it is being restarted, with all of them
                await self._register(protocol)

    def on_restart(self, callback: RestartCallback) -> None:
        """``await callback()`` after each restart, when the protocols are served again."""
        self._callbacks.append(callback)

    # --- one life ----------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        network, timeouts = self._settings.network, self._settings.timeouts
        key_file = self._identity.private_key_file(self._folder)
        starting = asyncio.ensure_future(
            self._p2p_class.create(  # type: ignore[attr-defined]
                identity_path=str(key_file),
                check_if_identity_free=False,  # knows RSA only, and needs a second daemon; our lock file does it
                host_maddrs=self._host_maddrs or None,
                announce_maddrs=self._announce_maddrs or None,
                no_listen=not self._listen,
                dht_mode="server" if self._listen else "client",
                nat_port_map=network.nat_port_map,
                auto_nat=network.auto_nat,
                use_relay=network.use_relay,
                use_auto_relay=network.use_relay,
                startup_timeout=timeouts.daemon_start_s,
            )
        )
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            await asyncio.wait({starting})  # hivemind would leave its p2pd to itself
            if starting.exception() is None:
                self._p2p = starting.result()  # for our end
            raise
        except Exception as error:
            raise translate(error, self.local, timeouts.daemon_start_s) from error
        self._p2p = p2p = starting.result()
        self._missed.clear()
        if p2p.peer_id.to_base58() != self._identity.peer_id:
            raise Internal(f"p2pd runs as {p2p.peer_id}, not as {self._identity.peer_id}")
        self._found_at(map(str, p2p._visible_maddrs))
        self.alive = True

    def _found_at(self, addresses: Iterable[str]) -> None:
        # what is of use to all comes first
        visible = sorted(filter(multiaddrs.is_dialable, addresses), key=multiaddrs.is_loopback)
        if self._listen and visible:  # without a network for a moment it will be where it was
            suffix = f"/p2p/{self._identity.peer_id}"
            self.local = PeerAddress(self._identity.peer_id, tuple(f"{address}{suffix}" for address in visible))

    async def _register(self, protocol: str) -> None:
        timeout_s = self._settings.timeouts.open_s
        try:
            async with asyncio.timeout(timeout_s):
                await self.p2p.add_binary_stream_handler(protocol, self._incoming)
        except Exception as error:
            raise translate(error, self.local, timeout_s) from error

    async def _incoming(self, info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One stream, in a task of its own that hivemind's listener has made."""
        await self._accept(PeerId(info.peer_id.to_base58()), str(info.addr), info.proto, reader, writer)

    async def _end(self) -> None:
        self.alive = False
        if self._p2p is None:
            return
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
        await cancel(tasks)  # hivemind cancels them and doesn't wait

    # --- the next one ------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """hivemind doesn't notice that its daemon died, and calls hang for ever."""
        telling: list[asyncio.Task[None]] = []
        try:
            while True:
                await self._died()
                self.alive = False
                self._usable.clear()
                log.error("p2pd (pid %d) ended; restarting it with the same identity and ports", self.pid)
                self._on_death()
                await cancel(telling)
                await self._end()
                await self._restart()
                telling = [asyncio.create_task(self._tell_of_restart())]  # it may take long, and the next one may die
        finally:
            await cancel(telling)

    async def _died(self) -> None:
        """Returns when the daemon is dead; one that lives but no longer answers is killed first."""
        child, misses = self._p2p._child, 0
        end = asyncio.ensure_future(child.wait())
        try:
            while not end.done():
                await asyncio.wait({end}, timeout=self._settings.discovery.ping_period_s)
                if end.done():
                    break
                addresses = await own_addresses(self._socket, self._settings.timeouts.info_s)
                if addresses is not None:
                    misses = 0
                    self._found_at(addresses)
                elif (misses := misses + 1) >= 2:  # twice, because a blocked event loop looks the same
                    log.error("p2pd (pid %d) does not answer; killing it", child.pid)
                    with contextlib.suppress(ProcessLookupError):
                        child.kill()
                    await end
        finally:
            await cancel([end])

    async def _restart(self) -> None:
        wait_s = _RESTART_FIRST_S
        while True:
            try:
                await self._start()
                for protocol in self._protocols:
                    await self._register(protocol)
                break
            except Exception as error:  # whatever it is, without a daemon this process is nothing: try again for ever
                await self._end()
                log.error("can't restart p2pd, next attempt in %.1f s: %s", wait_s, error)
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, _RESTART_MOST_S)
        self.restarts += 1
        self._usable.set()
        log.warning("p2pd runs again (pid %d)", self.pid)

    async def _tell_of_restart(self) -> None:
        for callback in self._callbacks:
            try:
                async with asyncio.timeout(self._settings.timeouts.daemon_start_s):
                    await callback()
            except Exception:  # one that can't recover must not keep the others from it
                log.exception("a callback failed after the restart of p2pd")


def _announced(text: str) -> str:
    """Without the peer id, which all addresses get. Raises :class:`ConfigError`."""
    try:
        return multiaddrs.split(text)[0]
    except ValueError as error:
        raise ConfigError(f"bad address to announce {text!r}: {error}") from None


async def cancel(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel and wait, so that no task outlives its owner."""
    pending = list(tasks)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
