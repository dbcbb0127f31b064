"""Dialling a peer that asks whether it can be dialled, over a connection of its own. After libp2p's AutoNAT.

Only the host that the question came from is dialled, so nobody can have others knocked at; each at the ports that the
asker announces. (A router that lets in whoever was called from inside would let us in by any port: no peer can tell.)
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from swarm import multiaddrs
from swarm import protocol_pb2 as pb
from swarm.config import Settings
from swarm.errors import Busy, NotAllowed, ProtocolError, Unreachable
from swarm.identity import Identity
from swarm.libp2p import Libp2pTransport
from swarm.protocol import address_from_wire
from swarm.transport import Stream
from swarm.types import PeerAddress

MOST_DIALS = 2
"""Of one question: each may take ``timeouts.connect_s``."""
PER_MINUTE = 10
"""Questions, of all peers together; one at a time. Each costs a p2p daemon for a moment."""

Connect = Callable[[PeerAddress], Awaitable[None]]
"""Dials the peer at its addresses and makes sure that it is the peer; raises ``Unreachable``."""
Dialler = Callable[[], AbstractAsyncContextManager[Connect]]


def new_dialler(settings: Settings) -> Dialler:
    """A client with a p2p daemon of its own: ours would take the connection that the question came through."""

    @asynccontextmanager
    async def dialler() -> AsyncIterator[Connect]:
        async with Libp2pTransport(Identity.ephemeral(), settings, listen=False) as client:
            yield client.connect

    return dialler


class DialBack:
    """Answers :func:`swarm.info.ask_to_dial_back`."""

    def __init__(self, dialler: Dialler, clock: Callable[[], float] = time.monotonic) -> None:
        self._dialler = dialler
        self._clock = clock
        self._began: deque[float] = deque(maxlen=PER_MINUTE)
        self._dialling = False

    async def answer(self, stream: Stream, request: pb.DialMe) -> pb.DialledBack:
        """Raises ``Busy``, ``NotAllowed``, ``ProtocolError``."""
        asker = address_from_wire(request.peer)
        if asker.peer_id != stream.remote:
            raise NotAllowed("a peer can have only itself dialled")
        reply = pb.DialledBack(seen_at=stream.remote_address)
        addresses = candidates(stream.remote_address, asker.multiaddrs)
        if not addresses:
            return reply
        self._take_turn()
        try:
            async with self._dialler() as connect:
                for address in addresses:
                    error = await _failure(connect, PeerAddress(asker.peer_id, (address,)))
                    reply.dials.add(multiaddr=address, error=error)
                    if not error:  # and the daemon, connected now, would not dial again
                        break
        finally:
            self._dialling = False
        return reply

    def _take_turn(self) -> None:
        now = self._clock()
        if self._dialling or (len(self._began) == PER_MINUTE and now - self._began[0] < 60):
            raise Busy("this peer has dialled many others just now")
        self._began.append(now)
        self._dialling = True


async def _failure(connect: Connect, peer: PeerAddress) -> str:
    try:
        await connect(peer)
    except Unreachable as error:
        return error.message.replace(f"peer {peer.peer_id}", "it")
    return ""


def candidates(seen_at: str, announced: Iterable[str]) -> list[str]:
    """The announced ports, at the host of ``seen_at``; none for one that came through a relay. Raises ProtocolError."""
    try:
        seen = str(multiaddrs.parse(seen_at)).split("/")  # "", "ip4", HOST, "tcp", PORT, ...
        ports = ["/".join(multiaddrs.split(text)[0].split("/")[3:]) for text in announced]
    except ValueError as error:
        raise ProtocolError(f"a peer that gives as its address: {error}") from None
    if "p2p-circuit" in seen:
        return []
    direct = dict.fromkeys(port for port in ports if "p2p-circuit" not in port)
    return [f"/{seen[1]}/{seen[2]}/{port}" for port in direct][:MOST_DIALS]
