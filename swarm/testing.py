"""A network, a clock and a decoder in memory, all seeded: for tests of whatever is built on sessions.

The real session and stage code runs on these unchanged. Time is virtual: the event loop jumps to the next
timer when nothing else is ready, so hours of timeouts pass in milliseconds, and a wait that nothing can
end shows at once as :class:`Deadlock`. The idea is FoundationDB's simulation (Zhou et al., SIGMOD 2021);
the loop follows trio's autojump clock.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import selectors
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from swarm.errors import StreamLost, Unreachable
from swarm.link_times import Links, links_of
from swarm.transport import CONTROL, LINK, Handler, Stream
from swarm.types import Announcement, LayerRange, PeerAddress, PeerId

T = TypeVar("T")


class Deadlock(AssertionError):
    """No timer runs and no task is ready: somebody waits without a deadline."""


class _Jump(selectors.BaseSelector):
    """Knows no files; instead of waiting it moves the loop's clock."""

    def __init__(self) -> None:
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise Deadlock("every task waits for something that nobody will do")
        self.now += max(0.0, timeout)
        return []

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return selectors.SelectorKey(fileobj, 0, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return selectors.SelectorKey(fileobj, 0, 0, None)

    def get_map(self) -> dict[Any, Any]:
        return {}

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        raise KeyError(fileobj)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer when nothing is ready."""

    def __init__(self) -> None:
        self._jump = _Jump()
        super().__init__(self._jump)

    def time(self) -> float:
        return self._jump.now


def run_virtual(main: Callable[[], Awaitable[T]]) -> T:
    """``asyncio.run`` on a :class:`VirtualLoop`."""

    async def call() -> T:
        return await main()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(call())


# ---- the network ----------------------------------------------------------------------------------------


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
        self._ended = False
        node.streams.add(self)

    @property
    def remote(self) -> PeerId:
        return self._remote_node.address.peer_id

    @property
    def remote_address(self) -> str:
        return "" if self.opener else self._remote_node.seen_at

    async def send(self, frame: bytes) -> None:
        await self.node.awake()
        if self._ended:
            raise StreamLost("the stream is closed")
        self.node.network.carry(self, frame)

    def try_send(self, frame: bytes) -> bool:
        if self._ended or self.node.frozen:
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
        arrival = loop.time() + rng.uniform(*faults.latency_s)
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


# ---- the decoder ----------------------------------------------------------------------------------------

_MASK = (1 << 64) - 1
BROKEN_ROW = b"\xff" * 8
"""Stands for a row that is not finite; its beginning does, where rows are rounded."""


def mix(*values: int) -> int:
    """A 64-bit hash (splitmix64's finaliser over a running sum)."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state + value) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


@dataclass
class ToyCache:
    """For each layer and position, a hash of all inputs up to there; what a KV cache is to attention."""

    layers: LayerRange
    capacity: int
    length: int = 0
    serial: int = field(default_factory=itertools.count().__next__)
    prefix: dict[int, list[int]] = field(default_factory=dict)

    def truncate(self, length: int) -> None:
        self.length = min(self.length, length)
        for column in self.prefix.values():
            del column[length:]


class ToyDecoder:
    """A decoder whose next token depends on every token and every layer before it.

    A hidden state is one 64-bit number. Whatever is lost, doubled, misordered or run through a layer twice
    changes every later token.
    """

    ROW_BYTES = 8
    ROUNDED_BYTES = 4
    """Of a row on a wire that rounds: the number's beginning."""

    def __init__(self, num_layers: int, vocab_size: int, seed: int, echo: float = 0.0) -> None:
        """``echo``: share of tokens that are those which followed the token before them last time."""
        self.num_layers, self.vocab_size, self.seed, self.echo = num_layers, vocab_size, seed, echo

    def run(self, layers: LayerRange, cache: ToyCache, start: int, rows: Sequence[int]) -> list[int]:
        """``rows``: token ids for layer 0, else hidden states; returns the hidden states after ``layers``."""
        if start > cache.length or cache.layers != layers or start + len(rows) > cache.capacity:
            raise AssertionError(f"rows at {start} on a cache of {cache.length} for {cache.layers}, run as {layers}")
        cache.truncate(start)
        outputs = []
        for row in rows:
            state = row
            for layer in range(layers.start, layers.end):
                column = cache.prefix.setdefault(layer, [])
                column.append(mix(column[-1] if column else layer, state))
                state = mix(self.seed, layer, state, column[-1])
            outputs.append(state)
        cache.length = start + len(rows)
        return outputs

    def caches(self, capacity: int, cuts: Sequence[int] = ()) -> list[ToyCache]:
        """Of all layers, for :meth:`run_all`; ``cuts``: layers before which rows are rounded."""
        bounds = [0, *cuts, self.num_layers]
        return [ToyCache(LayerRange(start, end), capacity) for start, end in itertools.pairwise(bounds)]

    def run_all(self, caches: Sequence[ToyCache], rows: Sequence[int]) -> list[int]:
        """The hidden states of ``rows``, which are token ids that follow those before, after the last layer."""
        states = list(rows)
        for cache in caches:
            if cache.layers.start:
                states = self.from_wire(self.to_wire(states, self.ROUNDED_BYTES), self.ROUNDED_BYTES)
            states = self.run(cache.layers, cache, cache.length, states)
        return states

    @classmethod
    def to_wire(cls, states: Sequence[int], row_bytes: int) -> bytes:
        return b"".join(state.to_bytes(cls.ROW_BYTES, "big")[:row_bytes] for state in states)

    @classmethod
    def from_wire(cls, data: bytes, row_bytes: int) -> list[int]:
        rows = (data[start : start + row_bytes] for start in range(0, len(data), row_bytes))
        return [int.from_bytes(row.ljust(cls.ROW_BYTES, b"\0"), "big") for row in rows]

    def token(self, state: int, seed: int, history: Sequence[int]) -> int:
        """What follows ``history``, whose last token's hidden state is ``state``."""
        noise = mix(state, len(history), seed)
        if noise >> 32 < self.echo * 2**32:
            for place in range(len(history) - 2, -1, -1):
                if history[place] == history[-1]:
                    return history[place + 1]
        return noise % self.vocab_size

    def logits(self, states: Sequence[int]) -> bytes:
        """Float32 ``[rows, vocabulary]``, for step mode: every number depends on all of the row's state."""
        values = [mix(state, token) % 2**24 for state in states for token in range(self.vocab_size)]
        return struct.pack(f"<{len(values)}f", *values)

    def generate(
        self, prompt: Sequence[int], max_tokens: int, seed: int, end_ids: frozenset[int], cuts: Sequence[int] = ()
    ) -> list[int]:
        """What an undisturbed run gives; ``cuts``: layers before which rows are rounded."""
        caches = self.caches(len(prompt) + max_tokens, cuts)
        tokens, rows = list(prompt), list(prompt)
        while True:
            state = self.run_all(caches, rows)[-1]
            tokens.append(self.token(state, seed, tokens))
            if tokens[-1] in end_ids or len(tokens) == len(prompt) + max_tokens:
                return tokens[len(prompt) :]
            rows = tokens[-1:]
