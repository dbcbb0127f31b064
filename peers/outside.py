"""The way out of a peer for its stages: to other peers, and back to who sent something."""

from __future__ import annotations

from typing import Protocol

from swarm import protocol_pb2 as pb
from swarm.types import PeerAddress, PeerId


class Outside(Protocol):
    """What a runner may say to the world."""

    @property
    def local_id(self) -> PeerId: ...

    def try_to_peer(self, peer: PeerAddress, message: pb.LinkMessage) -> bool:
        """Send without waiting. ``False``: nothing was sent, because the link isn't open or is congested."""

    async def reach(self, peer: PeerAddress) -> None:
        """Open the link to ``peer``, if there is none."""

    async def to_peer(self, peer: PeerAddress, message: pb.LinkMessage) -> None: ...

    def acknowledge(self, sender: PeerId, ack: pb.Ack) -> None: ...

    def link_s(self, peer: PeerId) -> float:
        """Measured time one way to ``peer``; 0: not measured."""

    def frame_rows(self, peer: PeerId, row_bytes: int) -> int:
        """What one frame to ``peer`` should have at most: fewer rows on a narrow link."""

    def carried(self, peer: PeerAddress) -> int:
        """Changes as frames of prompts and replays arrive at ``peer``, whichever session they are of."""
