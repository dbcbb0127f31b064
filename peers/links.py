"""Streams to other peers: one each, opened on first use, shared by all sessions, watched while in use."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from peers.line import Line, Measured
from swarm import protocol_pb2 as pb
from swarm.config import TimeoutSettings
from swarm.errors import DeadlineExceeded, StreamLost, SwarmError
from swarm.protocol import decode
from swarm.transport import LINK, Stream, Transport
from swarm.types import PeerAddress, PeerId

logger = logging.getLogger(__name__)

ReplyHandler = Callable[[PeerId, pb.LinkMessage], None]
LostHandler = Callable[[PeerId, SwarmError], None]

PROBE_PINGS = 5
"""The first of a link does not count: it may wait until the remote has accepted the stream."""
MOST_MEASURED = 256
"""Peers whose round trip is remembered; the one measured longest ago is forgotten first."""
_UNKNOWN = Measured()


@dataclass(slots=True, eq=False)
class _Link:
    stream: Stream
    last_used: float
    heard_at: float
    probed_at: float = 0.0
    pinged_at: float = 0.0
    pings: int = 0
    answered: int = 0
    """Number of the newest pong."""
    pong: asyncio.Event = field(default_factory=asyncio.Event)
    line: Line = field(default_factory=Line)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Of whose frame is next; the others come after it in the order in which they asked."""
    watcher: asyncio.Task[None] | None = None


class Links:
    """Outgoing links. Acks and refusals come back on the same stream and go to ``on_reply``.

    While a link is in use it is pinged: its round trip is measured, and a remote that is silent for
    ``heartbeat_misses`` heartbeats is lost. ``on_lost`` hears of every end that was not ours.
    """

    def __init__(
        self,
        transport: Transport,
        tasks: asyncio.TaskGroup,
        timeouts: TimeoutSettings,
        on_reply: ReplyHandler,
        on_lost: LostHandler,
        awaits: Callable[[PeerId], bool] = lambda peer: False,
    ) -> None:
        """``awaits``: whether acks are still to come from a peer, which may take long to compute what it has."""
        self._transport = transport
        self._tasks = tasks
        self._timeouts = timeouts
        self._on_reply = on_reply
        self._on_lost = on_lost
        self._awaits = awaits
        self._links: dict[PeerId, _Link] = {}
        self._dialling: WeakValueDictionary[PeerId, asyncio.Lock] = WeakValueDictionary()
        """Held by those who dial a peer, or wait for who does."""
        self.measured: dict[PeerId, Measured] = {}

    def _measured(self, peer: PeerId) -> Measured:
        return self.measured.get(peer, _UNKNOWN)

    def one_way_s(self, peer: PeerId) -> float:
        """Half of the measured round trip; 0 if none was measured."""
        return self._measured(peer).one_way_s

    def frame_rows(self, peer: PeerId, row_bytes: int) -> int:
        """What one frame to ``peer`` should have at most, so that what is sent after it need not wait long."""
        return self._measured(peer).frame_rows(row_bytes)

    def carried(self, peer: PeerId) -> int:
        """Changes as frames of prompts and replays arrive at ``peer``."""
        link = self._links.get(peer)
        return link.line.carried if link is not None else 0

    def used_at(self, peer: PeerId) -> float:
        """When a session last sent something to ``peer``, by the loop's clock; 0: never on this link."""
        link = self._links.get(peer)
        return link.last_used if link is not None else 0.0

    async def probe(self, peer: PeerAddress) -> None:
        """Measure the way to ``peer``; the link stays open for sessions. Raises :class:`SwarmError`."""
        link = self._links.get(peer.peer_id) or await self._dial(peer)
        link.probed_at = _now()
        deadline_s = self._timeouts.heartbeat_s * self._timeouts.heartbeat_misses
        try:
            async with asyncio.timeout(deadline_s):
                for _ in range(PROBE_PINGS):
                    await self._ping(link)
                    number = link.pings
                    while link.answered < number:
                        link.pong.clear()
                        await link.pong.wait()
        except TimeoutError:
            raise DeadlineExceeded(f"no pong within {deadline_s:g} s") from None

    def try_send(self, peer: PeerAddress, message: pb.LinkMessage) -> bool:
        """Send without waiting; ``False`` if there is no link yet, or too much waits on it already."""
        link = self._links.get(peer.peer_id)
        if link is None or not link.stream.try_send(message.SerializeToString()):
            return False
        link.last_used = _now()
        return True

    async def reach(self, peer: PeerAddress) -> None:
        """Open the link before there is something to send. Raises ``Unreachable``."""
        if peer.peer_id not in self._links:
            await self._dial(peer)

    async def send(self, peer: PeerAddress, message: pb.LinkMessage) -> None:
        """Raises ``Unreachable`` or ``StreamLost``; the next send dials again."""
        link = self._links.get(peer.peer_id) or await self._dial(peer)
        frame = message.SerializeToString()
        try:
            if message.frame.want_ack:
                await self._send_in_turn(peer.peer_id, link, frame)
            else:
                link.last_used = _now()
                await link.stream.send(frame)
        except StreamLost as error:
            self._lose(peer.peer_id, link, error)  # what others have sent on it is lost, too
            raise

    async def _send_in_turn(self, peer: PeerId, link: _Link, frame: bytes) -> None:
        """A frame of a prompt or replay, once what is under way leaves room for it."""
        async with link.turn:
            line = link.line
            while line.under_way_bytes and line.under_way_bytes + len(frame) > self._measured(peer).lead_bytes:
                if self._links.get(peer) is not link:
                    raise StreamLost(f"the link to {peer[-6:]} is lost")
                link.pong.clear()
                if line.unmarked:  # who sent it was cancelled before its ping
                    await self._ping(link)
                await link.pong.wait()
            began_at = link.last_used = _now()
            line.sent(len(frame))
            await link.stream.send(frame)
            await self._ping(link, began_at, len(frame))

    async def _dial(self, peer: PeerAddress) -> _Link:
        lock = self._dialling.setdefault(peer.peer_id, asyncio.Lock())
        async with lock:
            link = self._links.get(peer.peer_id)
            if link is None:
                stream = await self._transport.open(peer, LINK)
                link = self._links[peer.peer_id] = _Link(stream, last_used=0.0, heard_at=_now(), probed_at=_now())
                self._tasks.create_task(self._listen(peer.peer_id, link))
                link.watcher = self._tasks.create_task(self._watch(peer.peer_id, link))
        return link

    async def _listen(self, peer_id: PeerId, link: _Link) -> None:
        try:
            while (frame := await link.stream.receive()) is not None:
                message = decode(pb.LinkMessage, frame)
                link.heard_at = _now()
                if message.WhichOneof("kind") == "pong":
                    self._measure(peer_id, link, message.pong)
                else:
                    self._on_reply(peer_id, message)
        except SwarmError as error:
            self._lose(peer_id, link, error)
        finally:
            self._drop(peer_id, link)

    async def _watch(self, peer_id: PeerId, link: _Link) -> None:
        heartbeat_s = self._timeouts.heartbeat_s
        line, carried, standing = link.line, 0, 0
        try:
            while True:
                # Counted in heartbeats, and not on the clock: while this process stood still nobody was silent.
                stands = line.under_way_bytes and not line.unmarked and line.carried == carried
                carried, standing = line.carried, standing + 1 if stands else 0
                if standing * heartbeat_s > self._timeouts.send_s:
                    raise DeadlineExceeded(f"nothing of a prompt arrived for {self._timeouts.send_s:g} s")
                if link.pings and link.pinged_at > link.heard_at + heartbeat_s * (self._timeouts.heartbeat_misses - 1):
                    raise DeadlineExceeded(f"no pong for {_now() - link.heard_at:.1f} s")
                if not line.under_way_bytes and self._awaits(peer_id):
                    link.last_used = _now()
                if _now() - max(link.last_used, link.probed_at) > self._timeouts.link_idle_s:
                    await link.stream.close()
                    return
                due = link.answered < link.pings and not link.line.under_way_bytes  # not behind a prompt
                if due or _now() - link.last_used <= heartbeat_s:
                    await self._ping(link)
                else:
                    link.heard_at = _now()  # nothing was asked, so nothing can be late
                await asyncio.sleep(heartbeat_s)
        except SwarmError as error:
            self._lose(peer_id, link, error)
        finally:
            self._drop(peer_id, link)

    @staticmethod
    async def _ping(link: _Link, began_at: float | None = None, size_bytes: int = 0) -> None:
        """Behind a frame of ``size_bytes`` whose sending began then, or alone."""
        link.pings += 1
        link.pinged_at = _now()
        link.line.pinged(link.pings, link.pinged_at if began_at is None else began_at, size_bytes)
        await link.stream.send(pb.LinkMessage(ping=link.pings).SerializeToString())

    def _measure(self, peer: PeerId, link: _Link, number: int) -> None:
        if not link.answered < number <= link.pings:
            return
        link.answered = number
        link.pong.set()
        known = self.measured.pop(peer, None) or Measured()
        link.line.ponged(number, _now(), known)
        if not (known.round_trips or known.rates):
            return
        self.measured[peer] = known
        while len(self.measured) > MOST_MEASURED:
            del self.measured[next(iter(self.measured))]

    def _lose(self, peer_id: PeerId, link: _Link, error: SwarmError) -> None:
        if self._links.get(peer_id) is link:
            logger.info("link to %s is lost: %s", peer_id[-6:], error)
            self._drop(peer_id, link)
            self._on_lost(peer_id, error)

    def _drop(self, peer_id: PeerId, link: _Link) -> None:
        if self._links.get(peer_id) is link:
            del self._links[peer_id]
        link.pong.set()  # nobody need wait for it any more
        link.stream.abort()
        if link.watcher is not None and link.watcher is not asyncio.current_task():
            link.watcher.cancel()

    async def aclose(self) -> None:
        links, self._links = list(self._links.values()), {}
        for link in links:
            if link.watcher is not None:
                link.watcher.cancel()
            await link.stream.close()


def _now() -> float:
    return asyncio.get_running_loop().time()
