"""A swarm of peer processes on this machine: for the quick start, for benchmarks and for tests with real faults."""

from __future__ import annotations

import itertools
import signal
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from swarm.children import PYTHON, Child, Guard, inherited_environment
from swarm.config import TimeoutSettings
from swarm.errors import BadRequest, DeadlineExceeded, SwarmError
from swarm.nursery import Nursery
from swarm.types import LayerRange, PeerId

PEER_COMMAND = (*PYTHON, "-m", "peers.cli")
"""Peers are started, never imported: they need more than a client does."""

START_S = 180.0
"""For a peer to load its layers; longer if it has to download them."""
STOP_S = 10.0
"""After SIGTERM; then SIGKILL."""
PROGRESS_S = 3.0
SAID = 100
"""Characters of what the first of those that load said last."""

Layers = LayerRange | Literal["auto"]


def even_ranges(num_layers: int, parts: int) -> list[LayerRange]:
    """``0:num_layers`` in ``parts`` ranges that differ by a layer at most; fewer if there aren't so many layers."""
    parts = min(parts, num_layers)
    bounds = [num_layers * part // parts for part in range(parts + 1)]
    return [LayerRange(start, end) for start, end in itertools.pairwise(bounds)]


@dataclass(slots=True)
class LocalPeer:
    """One peer process; ``peer_id``, ``addresses`` and ``layers`` are what it said when it was ready."""

    child: Child
    peer_id: PeerId
    addresses: tuple[str, ...]
    model: str
    layers: LayerRange
    frozen: bool = False

    @property
    def pid(self) -> int:
        return self.child.pid

    @property
    def alive(self) -> bool:
        return self.child.alive


def _silent(_: str) -> None:
    pass


class LocalSwarm:
    """``with LocalSwarm("smollm2-135m", [LayerRange(0, 15), LayerRange(15, 30)]) as swarm: ...``

    The peers take nothing from this process's ``SWARM_...`` variables (they must not join somebody else's swarm);
    ``env`` gives them some. No process is left behind, even if the owner is killed.
    """

    def __init__(
        self,
        model: str,
        ranges: Sequence[Layers],
        *,
        dtype: str | None = None,
        weights: str | None = None,
        threads: int = 1,
        extra_args: Sequence[str] = (),
        args_of: Mapping[int, Sequence[str]] | None = None,
        env: Mapping[str, str] | None = None,
        log_dir: Path | None = None,
        start_s: float = START_S,
        stop_s: float = STOP_S,
        keep_nursery: bool = False,
        command: Sequence[str] = PEER_COMMAND,
        report: Callable[[str], None] = _silent,
    ) -> None:
        """``extra_args``: for every peer; ``args_of``: more of them for the first one started (0), the second ...

        ``log_dir``: where the peers' stderr stays; None: a temporary folder. ``report`` hears of the progress.
        ``keep_nursery``: peers that are added start as soon as the first ones, for 160 MB of memory meanwhile.
        """
        if not ranges:
            raise BadRequest("a local swarm needs at least one layer range")
        self.peers: list[LocalPeer] = []
        """In the order of ``ranges``, then of :meth:`add`; the dead ones stay in the list."""
        self._model = model
        self._ranges = tuple(ranges)
        self._args = [*(("--dtype", dtype) if dtype else ()), *(("--weights", weights) if weights else ()), *extra_args]
        self._args_of = dict(args_of or {})
        self._env = (
            inherited_environment() | {"PYTHONUNBUFFERED": "1", "SWARM_PEER_THREADS": str(threads)} | dict(env or {})
        )
        self._log_dir = log_dir
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._start_s, self._stop_s = start_s, stop_s
        self._command = tuple(command)
        self._keep_nursery = keep_nursery
        self._nursery: Nursery | None = None
        self._report = report
        self._guard = Guard()
        self._children: list[Child] = []
        """Every process, those included that never got ready."""

    def __enter__(self) -> LocalSwarm:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def initial_peers(self) -> list[str]:
        """Addresses of the peers that live and are not frozen, for ``--initial-peers`` or :func:`swarm.connect`."""
        return [address for peer in self.peers if peer.alive and not peer.frozen for address in peer.addresses]

    def start(self) -> None:
        """The first peer, then the others at once, through it. Raises :class:`SwarmError`; then nothing is left."""
        if self._children:
            raise BadRequest("this local swarm has been started")
        try:
            if self._log_dir is None:
                self._temporary = tempfile.TemporaryDirectory(prefix="swarm-")
            else:
                _make(self._log_dir)
            self._guard.start()
            if len(self._ranges) > 1 and self._command == PEER_COMMAND and Nursery.possible():
                self._nursery = Nursery(self._env)
                self._nursery.start()
            self._start(self._ranges[:1])
            self._start(self._ranges[1:])
            if self._nursery is not None and not self._keep_nursery:
                self._nursery.rest()
        except BaseException:  # Ctrl-C while it loads, too
            self.stop()
            raise

    def add(self, *layers: Layers) -> LocalPeer:
        """One more peer for each range, all at once; they join through those that live. Returns the last."""
        self._start(layers)
        return self.peers[-1]

    def kill(self, index: int) -> None:
        """SIGKILL to the peer and its daemon, as if the machine had lost power."""
        self.peers[index].child.bury()

    def freeze(self, index: int) -> None:
        """SIGSTOP to the peer and its daemon: connections stay open, nothing answers."""
        self.peers[index].child.freeze()
        self.peers[index].frozen = True

    def resume(self, index: int) -> None:
        self.peers[index].child.resume()
        self.peers[index].frozen = False

    def drain(self, index: int, timeout_s: float = TimeoutSettings().drain_s + STOP_S) -> int:
        """SIGTERM to the peer; waits until it has left. Its exit code; raises :class:`DeadlineExceeded`."""
        child = self.peers[index].child
        child.signal(signal.SIGTERM, alone=True)  # its daemon must live for as long as it drains
        code = child.wait(timeout_s)
        if code is None:
            raise DeadlineExceeded(f"{child.name} has not left after {timeout_s:g} s")
        child.bury()
        return code

    def stop(self) -> None:
        """SIGTERM to all, after ``stop_s`` SIGKILL. May be called again."""
        frozen = {peer.pid for peer in self.peers if peer.frozen}
        for child in self._children:
            if child.pid in frozen:
                child.signal(signal.SIGKILL)
            else:
                child.signal(signal.SIGTERM, alone=True)
        deadline = time.monotonic() + self._stop_s
        try:
            for child in self._children:
                child.wait(deadline - time.monotonic())
        finally:  # a second Ctrl-C must not leave them behind
            for child in self._children:
                child.bury()
            self._guard.close()
            if self._nursery is not None:
                self._nursery.close()
            if self._temporary is not None:
                self._temporary.cleanup()
                self._temporary = None

    def _start(self, ranges: Sequence[Layers]) -> None:
        begin = time.monotonic()
        started = [self._spawn(layers) for layers in ranges]
        ready: dict[Child, dict[str, Any]] = {}
        said_at = begin
        while len(ready) < len(started):
            waited = time.monotonic() - begin
            for child in started:
                # Briefly in turn: one that fails is noticed while another still loads.
                if child not in ready and (event := child.event("ready", timeout_s=0.1)) is not None:
                    ready[child] = event
                    self._report(f"{child.name}: ready after {time.monotonic() - begin:.1f} s")
            waiting = [child for child in started if child not in ready]
            if waiting and waited > self._start_s:
                child = waiting[0]
                raise DeadlineExceeded(f"{child.name} is not ready after {self._start_s:g} s:\n{child.tail()}")
            if waiting and time.monotonic() - said_at > PROGRESS_S:
                said_at = time.monotonic()
                names, said = ", ".join(child.name for child in waiting), textwrap.shorten(waiting[0].tail(1), SAID)
                self._report(f"{names}: loading, {waited:.0f} s  {said}".rstrip())
        self.peers += [_peer(child, ready[child]) for child in started]

    def _spawn(self, layers: Layers) -> Child:
        number = len(self._children)
        joins = [part for address in self.initial_peers for part in ("--initial-peers", address)]
        args = [
            *("serve", "--model", self._model, "--layers", str(layers), "--json"),
            *(*joins, *self._args, *self._args_of.get(number, ())),
        ]
        name = f"peer {number} [{layers}]"
        self._report(f"{name}: starting")
        child = Child.spawn(
            name=name,
            command=[*self._command, *args],
            fork=partial(self._nursery.fork, args) if self._nursery is not None else None,
            guard=self._guard,
            log=Path(self._temporary.name if self._temporary else self._log_dir or ".") / f"peer-{number}.log",
            env=self._env,
        )
        self._children.append(child)
        return child


def _peer(child: Child, event: Mapping[str, Any]) -> LocalPeer:
    try:
        start, end = event["layers"]
        return LocalPeer(
            child=child,
            peer_id=PeerId(str(event["peer_id"])),
            addresses=tuple(str(address) for address in event["addresses"]),
            model=str(event["model"]),
            layers=LayerRange(int(start), int(end)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise SwarmError(f"{child.name} printed a ready line that can't be read: {event!r} ({error})") from None


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadRequest(f"can't make the folder {folder}: {error.strerror}") from None
