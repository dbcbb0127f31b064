"""What a session needs of a network: two small Protocols.

``swarm.libp2p`` implements them over p2pd, ``swarm.testing`` in memory with a seed. Frames are opaque
bytes here; ``swarm.protocol`` gives them meaning.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from swarm.types import PeerAddress, PeerId

CONTROL = "swarm.control.1"
"""Owner to peer: one stream a session and hop."""
LINK = "swarm.link.1"
"""Peer to peer: one stream each way between two peers, shared by all sessions."""
INFO = "swarm.info.1"
"""Anyone to peer: one small question, one answer."""
DELEGATE = "swarm.delegate.1"
"""Thin client to peer: one generation, which the peer owns."""


class Stream(Protocol):
    """A duplex stream of frames, in order, to one authenticated peer."""

    @property
    def remote(self) -> PeerId: ...

    @property
    def remote_address(self) -> str:
        """Multiaddr from which the remote has opened it, as this end sees it; empty for one that this end
        opened, or that came from a process of this machine past the network."""

    @property
    def arrived_at(self) -> float:
        """When a part of a large frame arrived last, by the loop's clock: who sends one is silent meanwhile."""

    async def send(self, frame: bytes) -> None:
        """Write one frame; waits while the remote is slow. Raises ``StreamLost``, ``ProtocolError`` (too big)."""

    def try_send(self, frame: bytes) -> bool:
        """Write one frame without waiting. ``False``: nothing was written, because the stream is slow or broken."""

    async def receive(self) -> bytes | None:
        """The next frame, or ``None`` after the remote's end frame. Raises ``StreamLost`` on any other end."""

    async def close(self) -> None:
        """Send the end frame and close; never raises, never waits long."""

    def abort(self) -> None:
        """Drop the stream at once, without an end frame; the remote sees ``StreamLost``."""


Handler = Callable[[Stream], Awaitable[None]]


class Transport(Protocol):
    """One process on the network."""

    @property
    def local(self) -> PeerAddress: ...

    async def ready(self) -> int:
        """Wait until the network is usable; the number of restarts that it has been through.

        A stream that was opened before the latest restart was lost through no fault of its remote. Raises
        ``Unreachable`` after ``timeouts.daemon_start_s``, and ``Cancelled`` where the network was left.
        """

    async def open(self, peer: PeerAddress, protocol: str) -> Stream:
        """Dial ``peer``. Raises ``Unreachable`` within ``timeouts.connect_s``."""

    async def serve(self, protocol: str, handler: Handler) -> None:
        """Run ``handler`` for each incoming stream; the stream is closed when the handler returns."""
