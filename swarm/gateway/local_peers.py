"""Peers that this gateway started on its own machine: started, watched, drained, killed. Never anybody else's.

A peer is a process (:mod:`swarm.children`) that does not outlive the gateway, however that ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from swarm import multiaddrs
from swarm.architectures import DTYPE_BYTES, WEIGHTS
from swarm.children import Child, Guard, inherited_environment
from swarm.config import MAX_MEMORY_MB, MAX_THREADS
from swarm.errors import BadRequest, Busy, DeadlineExceeded, Internal
from swarm.local import PEER_COMMAND, START_S, STOP_S
from swarm.nursery import Nursery
from swarm.types import LayerRange

MAX_PEERS = 16
"""That run at once; one process with torch takes some hundred MB before its first layer."""
MAX_ENDED = 8
"""Of those that have ended, the newest stay listed, with the end of their log."""
LOG_LINES = 200
MAX_TEXT = 512
LEAST_MEMORY_MB = 64

_DEVICE = re.compile(r"auto|cpu|mps|cuda|cuda:\d{1,3}")


@dataclass(frozen=True, slots=True)
class PeerSpec:
    """What somebody asks for. Raises :class:`BadRequest` for what no peer could be started with."""

    model: str
    """A reference, as for ``swarm-peer serve``."""
    dtype: str = "float32"
    layers: str = "auto"
    """``START:END`` or ``auto``."""
    weights: str = "auto"
    """As for ``swarm-peer serve``."""
    device: str = "auto"
    max_memory_mb: int = 0
    """0: what is free."""
    threads: int = 1
    host_maddrs: str = ""
    """Where it listens: multiaddrs with commas between them. Empty: the loopback only, on any free port."""

    def __post_init__(self) -> None:
        if self.layers != "auto":
            LayerRange.parse(self.layers)
        if not _DEVICE.fullmatch(self.device):
            raise BadRequest(f"{self.device!r} is no device; take auto, cpu, mps, cuda or cuda:N")
        if self.max_memory_mb and not LEAST_MEMORY_MB <= self.max_memory_mb <= MAX_MEMORY_MB:
            raise BadRequest(f"the memory cap must be {LEAST_MEMORY_MB} to {MAX_MEMORY_MB} MB, or 0 for what is free")
        if not 0 <= self.threads <= MAX_THREADS:
            raise BadRequest(f"threads must be 0 (as many as torch likes) to {MAX_THREADS}, not {self.threads}")
        if self.dtype not in DTYPE_BYTES:
            raise BadRequest(f"{self.dtype!r} is no dtype; take one of {', '.join(DTYPE_BYTES)}")
        if self.weights not in WEIGHTS:
            raise BadRequest(f"weights can't be {self.weights!r}; take one of {', '.join(WEIGHTS)}")
        if not 0 < len(self.model) <= MAX_TEXT or not self.model.isprintable() or self.model.startswith("-"):
            raise BadRequest("that is no reference to a model")
        for text in self.listens:
            try:
                multiaddrs.parse(text)
            except ValueError as error:
                raise BadRequest(f"bad listen address {text[:MAX_TEXT]!r}: {error}") from None

    @property
    def listens(self) -> list[str]:
        return [text for part in self.host_maddrs.split(",") if (text := part.strip())]


@dataclass(frozen=True, slots=True)
class OwnPeer:
    """How one of them is now."""

    name: str
    """``p1``, ``p2``, ...: what the API calls it; never used twice."""
    spec: PeerSpec
    state: str
    """starting, loading, serving, draining, left or failed"""
    detail: str
    """One sentence for a person."""
    code: str
    """Of the error with which it failed, or empty."""
    percent: int
    """Of the layers' weights, while it loads."""
    pid: int
    peer_id: str
    """Empty until it is ready, like ``addresses`` and ``layers``."""
    addresses: tuple[str, ...]
    model: str
    layers: LayerRange | None
    memory_mb: int
    """Resident, of the peer and its p2pd."""
    started_s: float
    """Seconds since it was started."""

    @property
    def ended(self) -> bool:
        return self.state in ("left", "failed")

    def as_json(self) -> dict[str, Any]:
        layers = [self.layers.start, self.layers.end] if self.layers else None
        return {
            "name": self.name,
            "state": self.state,
            "detail": self.detail,
            "code": self.code,
            "percent": self.percent,
            "pid": self.pid,
            "peer_id": self.peer_id,
            "addresses": list(self.addresses),
            "model": self.model,
            "layers": layers,
            "memory_mb": self.memory_mb,
            "started_s": round(self.started_s, 1),
            "asked": {
                "model": self.spec.model,
                "dtype": self.spec.dtype,
                "weights": self.spec.weights,
                "layers": self.spec.layers,
                "device": self.spec.device,
                "max_memory_mb": self.spec.max_memory_mb,
                "threads": self.spec.threads,
                "host_maddrs": self.spec.host_maddrs,
            },
        }


@dataclass(slots=True)
class _Running:
    name: str
    spec: PeerSpec
    child: Child
    began: float
    killed: bool = False
    leaving: bool = False
    """It was told to leave."""


class LocalPeers:
    """``async with LocalPeers() as peers``; leaving the block stops them all."""

    def __init__(
        self,
        *,
        command: Sequence[str] = PEER_COMMAND,
        stop_s: float = STOP_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._command = tuple(command)
        self._stop_s = stop_s
        self._clock = clock
        self._running: dict[str, _Running] = {}
        self._number = 0
        self._guard = Guard()
        self._nursery: Nursery | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    async def __aenter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="swarm-gateway-")
        self._guard.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in self._running:
            self.drain(name)
        deadline = self._clock() + self._stop_s
        try:
            for running in self._running.values():
                await asyncio.to_thread(running.child.wait, deadline - self._clock())
        finally:
            for running in self._running.values():
                running.child.bury()  # kills those that took too long
            self._guard.close()
            if self._nursery is not None:
                self._nursery.close()
            if self._folder is not None:
                self._folder.cleanup()

    def peers(self) -> list[OwnPeer]:
        """In the order in which they were started."""
        return [self._now(running) for running in self._running.values()]

    def peer(self, name: str) -> OwnPeer:
        return self._now(self._find(name))

    def names(self) -> dict[str, str]:
        """Peer ids of those that run, with the names they have here. Cheap: for the path of a token."""
        running = [running for running in self._running.values() if running.child.alive]
        ids = [(str(one.child.newest("ready").get("peer_id", "")), one.name) for one in running]
        return {peer_id: name for peer_id, name in ids if peer_id}

    def gone(self) -> set[str]:
        """Peer ids of those that have ended: others may still take them for alive."""
        ended = [running for running in self._running.values() if not running.child.alive]
        return {str(running.child.newest("ready").get("peer_id", "")) for running in ended}

    def lost(self) -> list[OwnPeer]:
        """Those that served, and have ended although nobody told them to."""
        ended = [self._now(running) for running in self._running.values() if not running.child.alive]
        return [peer for peer in ended if peer.state == "failed" and peer.peer_id]

    @property
    def addresses(self) -> list[str]:
        """Of those that serve: others can join through them."""
        return [address for peer in self.peers() if peer.state == "serving" for address in peer.addresses]

    @contextlib.asynccontextmanager
    async def several(self) -> AsyncIterator[None]:
        """Those that are started meanwhile are forks of one process, where there can be one."""
        if self._command != PEER_COMMAND or not Nursery.possible():
            yield
            return
        self._nursery = Nursery(_environment())
        self._nursery.start()
        try:
            await asyncio.to_thread(self._nursery.ready)
            yield
        finally:
            self._nursery.rest()

    def start(self, spec: PeerSpec, initial_peers: Sequence[str]) -> OwnPeer:
        """Returns at once; :meth:`peer` tells of its progress. Raises :class:`Busy` beyond ``MAX_PEERS``."""
        if self._folder is None:
            raise Internal("local peers are started within their context")
        if sum(running.child.alive for running in self._running.values()) >= MAX_PEERS:
            raise Busy(f"{MAX_PEERS} peers of this gateway are running: that is the limit")
        self._forget_old()
        self._number += 1
        name = f"p{self._number}"
        joins = [part for address in initial_peers for part in ("--initial-peers", address)]
        listens = [part for text in spec.listens for part in ("--host-maddrs", text)]
        caps = ("--max-memory-mb", str(spec.max_memory_mb)) if spec.max_memory_mb else ()
        args = [
            *("serve", "--json", "--model", spec.model),
            *("--layers", spec.layers, "--device", spec.device, "--dtype", spec.dtype, "--weights", spec.weights),
            *("--threads", str(spec.threads), *caps, *listens, *joins),
        ]
        child = Child.spawn(
            name=f"peer {name}",
            command=[*self._command, *args],
            guard=self._guard,
            log=Path(self._folder.name) / f"{name}.log",
            env=_environment(),
            fork=partial(self._nursery.fork, args) if self._nursery is not None else None,
        )
        self._running[name] = _Running(name, spec, child, self._clock())
        return self.peer(name)

    async def serving(self, name: str, timeout_s: float = START_S) -> OwnPeer:
        """Wait until it serves. Raises what it failed with, or :class:`DeadlineExceeded`."""
        child = self._find(name).child
        if await asyncio.to_thread(child.event, "ready", timeout_s) is None:
            raise DeadlineExceeded(f"{child.name} is not ready after {timeout_s:g} s:\n{child.tail()}")
        return self.peer(name)

    def drain(self, name: str) -> OwnPeer:
        """SIGTERM: it hands its sessions over and leaves. Returns at once; for the second time it does nothing."""
        running = self._find(name)
        if running.child.alive and not running.leaving:  # a second signal would have it drop its sessions
            running.leaving = True
            running.child.signal(signal.SIGTERM, alone=True)  # its daemon must live for as long as it drains
        return self._now(running)

    def kill(self, name: str) -> OwnPeer:
        """SIGKILL to the peer and its daemon, as if the machine had lost power."""
        running = self._find(name)
        running.killed = running.killed or running.child.alive
        running.child.bury()
        return self._now(running)

    def log(self, name: str) -> str:
        """The end of what it wrote to stderr."""
        return self._find(name).child.tail(LOG_LINES)

    def _find(self, name: str) -> _Running:
        try:
            return self._running[name]
        except KeyError:
            raise BadRequest(f"this gateway started no peer {name[:20]!r}") from None

    def _forget_old(self) -> None:
        ended = [running for running in self._running.values() if not running.child.alive]
        for running in ended[: max(0, len(ended) - MAX_ENDED + 1)]:
            running.child.bury()
            del self._running[running.name]

    def _now(self, running: _Running) -> OwnPeer:
        child = running.child
        state, detail, percent = _state(running)
        said = child.newest("ready")
        return OwnPeer(
            name=running.name,
            spec=running.spec,
            state=state,
            detail=detail,
            code=str(child.newest("error").get("code", "")) if state == "failed" else "",
            percent=percent,
            pid=child.pid,
            peer_id=str(said.get("peer_id", "")),
            addresses=tuple(str(address) for address in said.get("addresses", ())),
            model=str(said.get("model", "")),
            layers=_range(child.newest("ready", "loading", "moving", "staying")),
            memory_mb=_memory_mb(child.pid) if child.alive else 0,
            started_s=self._clock() - running.began,
        )


def _environment() -> dict[str, str]:
    return inherited_environment() | {"PYTHONUNBUFFERED": "1"}


def _range(event: dict[str, Any]) -> LayerRange | None:
    match event.get("layers"):
        case [int(start), int(end)]:
            return LayerRange(start, end)
    return None


def _state(running: _Running) -> tuple[str, str, int]:
    """State, a sentence, and how much is loaded in percent."""
    child = running.child
    last = child.newest("loading", "ready", "moving", "staying", "draining")
    percent = int(last.get("percent", 0)) if last.get("event") == "loading" else 100 if last else 0
    if not child.alive:
        code = child.wait(0)
        if running.killed:
            return "left", "killed", percent
        if code == 0:
            return "left", "left the swarm", percent
        if running.leaving and code == -signal.SIGTERM:  # so early that it could not hear it
            return "left", "ended before it had joined", percent
        said = child.newest("error").get("message") or (child.tail(1) if code and code > 0 else "")
        ended = f"ended by signal {-code}" if code and code < 0 else f"ended with exit code {code}"
        return "failed", str(said or ended), percent
    match last.get("event"):
        case "draining":
            sessions = int(last.get("sessions", 0))
            return "draining", f"hands over {sessions} session{'' if sessions == 1 else 's'}", percent
        case _ if running.leaving:
            return "draining", "is told to leave", percent
        case "ready" | "staying":
            return "serving", "serving", percent
        case "moving":
            return "loading", f"moves: {last.get('reason', '')}", 0
        case "loading":
            return "loading", "reads its layers", percent
    return "starting", "starts", 0


def _memory_mb(pid: int) -> int:
    try:
        process = psutil.Process(pid)
        return sum(int(part.memory_info().rss) for part in (process, *process.children())) // 1_000_000
    except psutil.Error:
        return 0
