"""Nodes, the streams between them and what goes wrong there."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from swarm.errors import StreamLost, Unreachable
from swarm.link_times import Links, links_of
from swarm.transport import CONTROL, LINK, Handler, Stream
from swarm.types import Announcement, PeerAddress, PeerId


@dataclass
class Faults:
    """How the network treats frames; probabilities are per frame, times in seconds."""

    latency_s: tuple[float, float] = (0.0005, 0.005)
    slow: float = 0.0
    """Probability that a frame takes up to ``slow_s`` longer; the frames behind it wait."""
    slow_s: float = 0.5
    duplicate: float = 0.0
    """On links, and in what a peer says to an owner: no stream does that, but a faulty peer may."""
    reorder: float = 0.0
    """On links between peers only: real streams keep their order, but the stage must not depend on it."""


class SimNode:
    """One simulated process."""

    def __init__(self, network: SimNetwork, name: str) -> None:
        self.network = network
        self.address = PeerAddress(PeerId(name))
        self.seen_at = ""
        """Multiaddr that others see it come from."""
        self.handlers: dict[str, Handler] = {}
        self.streams: set[SimStream] = set()
        self.alive = True
        self.generation = 0
        self.tasks: set[asyncio.Task[Any]] = set()
        self._running = asyncio.Event()
        self._running.set()

    @property
    def frozen(self) -> bool:
        return not self._running.is_set()

    async def awake(self) -> None:
        """Code that stands for the process itself waits here while it is frozen."""
        await self._running.wait()

    def freeze(self) -> None:
        self._running.clear()

    def resume(self) -> None:
        self._running.set()

    def kill(self) -> None:
        """As SIGKILL: no goodbye; remotes see their streams break."""
        self.alive = False
        self._running.set()
        self.break_streams()
        for task in list(self.tasks):
            task.cancel()

    def restart_daemon(self) -> None:
        """The process lives on, its network daemon died and came back."""
        self.generation += 1
        self.break_streams()

    def break_streams(self) -> None:
        for stream in list(self.streams):
            stream.break_both()


class SimStream:
    """One end of a stream. Satisfies :class:`swarm.transport.Stream`."""

    def __init__(self, node: SimNode, remote: SimNode, protocol: str, *, opener: bool) -> None:
        self.node, self._remote_node, self.protocol, self.opener = node, remote, protocol, opener
        self.peer: SimStream
        self._incoming: deque[bytes | StreamLost | None] = deque()
        self._arrived = asyncio.Event()
        self._last_arrival = 0.0
        self._arriving: tuple[float, float] = (0.0, 0.0)
        """From when to when a narrow line carries what was sent to this end last."""
        self._ended = False
        node.streams.add(self)

    @property
    def remote(self) -> PeerId:
        return self._remote_node.address.peer_id

    @property
    def remote_address(self) -> str:
        return "" if self.opener else self._remote_node.seen_at

    @property
    def arrived_at(self) -> float:
        begins, ends = self._arriving
        now = asyncio.get_running_loop().time()
        return min(now, ends) if now >= begins else 0.0

    @property
    def _broken(self) -> bool:
        return self._ended or (len(self._incoming) > 0 and isinstance(self._incoming[-1], StreamLost))

    async def send(self, frame: bytes) -> None:
        await self.node.awake()
        if self._broken:
            raise StreamLost("the stream is closed")
        self.node.network.carry(self, frame)

    def try_send(self, frame: bytes) -> bool:
        if self._broken or self.node.frozen:
            return False
        self.node.network.carry(self, frame)
        return True

    async def receive(self) -> bytes | None:
        while True:
            await self.node.awake()
            if self._incoming:
                item = self._incoming[0]
                if isinstance(item, bytes):
                    return self._incoming.popleft()  # type: ignore[return-value]
                if isinstance(item, StreamLost):
                    raise StreamLost(item.message)
                return None
            self._arrived.clear()
            await self._arrived.wait()

    async def close(self) -> None:
        if not self._ended:
            self._ended = True
            if self.node.alive:
                self.node.network.carry(self, None)
            self.node.streams.discard(self)

    def abort(self) -> None:
        if not self._ended:
            self._ended = True
            self.node.network.carry(self, StreamLost("aborted by the remote"))
            self.node.streams.discard(self)
            self.arrive(StreamLost("aborted"))

    def arrive(self, item: bytes | StreamLost | None) -> None:
        if self._incoming and not isinstance(self._incoming[-1], bytes):
            return
        self._incoming.append(item)
        self._arrived.set()

    def break_both(self) -> None:
        for end in (self, self.peer):
            end._ended = True
            end.node.streams.discard(end)
            end.arrive(StreamLost("the connection broke"))


class SimNetwork:
    """All nodes, and what lies between them."""

    def __init__(self, rng: random.Random, faults: Faults) -> None:
        self.rng = rng
        self.faults = faults
        self.nodes: dict[PeerId, SimNode] = {}
        self.cut: set[frozenset[PeerId]] = set()
        """Pairs that can't hear each other; what they send waits."""
        self.bytes_per_s: dict[tuple[PeerId, PeerId], float] = {}
        """Of narrow lines, from one node to another: all that takes one goes through it piece after piece."""
        self._free_at: dict[tuple[PeerId, PeerId], float] = {}
        self._held: dict[frozenset[PeerId], list[tuple[SimStream, bytes | StreamLost | None]]] = {}

    def add(self, name: str) -> SimNode:
        node = SimNode(self, name)
        self.nodes[node.address.peer_id] = node
        return node

    def partition(self, a: PeerId, b: PeerId) -> None:
        self.cut.add(frozenset((a, b)))

    def heal(self, a: PeerId, b: PeerId) -> None:
        pair = frozenset((a, b))
        self.cut.discard(pair)
        for stream, item in self._held.pop(pair, []):
            self.carry(stream, item)

    def carry(self, sender: SimStream, item: bytes | StreamLost | None) -> None:
        """Deliver ``item`` to the other end, later, in order; some links duplicate and reorder."""
        receiver = sender.peer
        pair = frozenset((sender.node.address.peer_id, receiver.node.address.peer_id))
        if pair in self.cut:
            self._held.setdefault(pair, []).append((sender, item))
            return
        loop, rng, faults = asyncio.get_running_loop(), self.rng, self.faults
        line = (sender.node.address.peer_id, receiver.node.address.peer_id)
        left_at = max(loop.time(), self._free_at.get(line, 0.0))
        if isinstance(item, bytes) and line in self.bytes_per_s:
            begins, ends = receiver._arriving
            left_at = self._free_at[line] = (begun_at := left_at) + len(item) / self.bytes_per_s[line]
            receiver._arriving = begins if begun_at <= ends else begun_at, left_at
        arrival = left_at + rng.uniform(*faults.latency_s)
        if faults.slow and rng.random() < faults.slow:
            arrival += rng.uniform(0.0, faults.slow_s)
        unruly = sender.protocol == LINK and isinstance(item, bytes)
        stammers = isinstance(item, bytes) and (unruly or (sender.protocol == CONTROL and not sender.opener))
        if not (unruly and rng.random() < faults.reorder):  # timers that are due together come in no order
            arrival = receiver._last_arrival = max(receiver._last_arrival + 1e-6, arrival)
        loop.call_at(arrival, receiver.arrive, item)
        if stammers and rng.random() < faults.duplicate:
            loop.call_at(arrival + rng.uniform(0.0, 0.05), receiver.arrive, item)


class SimTransport:
    """A node's :class:`swarm.transport.Transport`."""

    def __init__(self, node: SimNode, connect_s: float = 3.0) -> None:
        self.node = node
        self._connect_s = connect_s

    @property
    def local(self) -> PeerAddress:
        return self.node.address

    async def ready(self) -> int:
        await self.node.awake()
        return self.node.generation

    async def serve(self, protocol: str, handler: Handler) -> None:
        self.node.handlers[protocol] = handler

    async def open(self, peer: PeerAddress, protocol: str) -> Stream:
        await self.node.awake()
        network = self.node.network
        remote = network.nodes.get(peer.peer_id)
        pair = frozenset((self.node.address.peer_id, peer.peer_id))
        await asyncio.sleep(network.rng.uniform(*network.faults.latency_s))
        if remote is None or not remote.alive or protocol not in remote.handlers:
            raise Unreachable(f"{peer.peer_id} can't be dialled")
        if pair in network.cut:
            await asyncio.sleep(self._connect_s)
            raise Unreachable(f"{peer.peer_id} does not answer")
        mine = SimStream(self.node, remote, protocol, opener=True)
        theirs = SimStream(remote, self.node, protocol, opener=False)
        mine.peer, theirs.peer = theirs, mine
        task = asyncio.ensure_future(self._handle(remote, protocol, theirs))
        remote.tasks.add(task)
        task.add_done_callback(remote.tasks.discard)
        return mine

    @staticmethod
    async def _handle(remote: SimNode, protocol: str, stream: SimStream) -> None:
        await remote.handlers[protocol](stream)
        await stream.close()


@dataclass
class Directory:
    """A swarm view without a DHT: tests add and remove announcements."""

    known: dict[PeerId, Announcement] = field(default_factory=dict)
    check: Callable[[Announcement], str | None] = lambda announcement: None

    def announcements(self) -> Sequence[Announcement]:
        return list(self.known.values())

    def links(self) -> Links:
        return links_of(self.known.values())

    def age(self, peer_id: PeerId) -> float:
        return 0.0

    async def refresh(self) -> None:
        await asyncio.sleep(0.01)
