"""What a stage tells its session's owner, who may be away for a while."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from peers.stage import Stage
from swarm import protocol_pb2 as pb
from swarm.errors import StreamLost, SwarmError
from swarm.protocol import error_to_wire
from swarm.types import PeerId

logger = logging.getLogger(__name__)

Tell = Callable[[pb.ControlReply], Awaitable[None]]


class OwnerLine:
    """Of one stage."""

    def __init__(self, stage: Stage, tasks: asyncio.TaskGroup) -> None:
        self.stream: Tell | None = None
        """The owner's control stream; ``None`` while the owner is away."""
        self._stage = stage
        self._tasks = tasks
        self._reporting: set[int] = set()
        """Epochs of which the owner is being told an error."""

    async def tell(self, reply: pb.ControlReply) -> None:
        """Raises :class:`SwarmError` if the owner is away, or the stream fails."""
        if self.stream is None:
            raise StreamLost("the owner's control stream is gone")
        await self.stream(reply)

    async def tell_status(self, status: pb.Status) -> None:
        """A heartbeat out of turn."""
        await self._try(pb.ControlReply(status=status))

    def report(self, error: SwarmError, blamed: PeerId | None) -> None:
        """Tell the owner, who decides; if the owner is away, its return will show the state.

        The error is one of the epoch in which this is called, whenever it is sent. One of an epoch ends it: while that
        is on its way to an owner that takes its time, others are passed over.
        """
        epoch = self._stage.epoch
        if epoch not in self._reporting:
            self._reporting.add(epoch)
            self._tasks.create_task(self._report(error, blamed, epoch))

    async def _report(self, error: SwarmError, blamed: PeerId | None, epoch: int) -> None:
        logger.info("session %s layers %s: %s", self._stage.session[:8], self._stage.layers, error)
        try:
            await self._try(pb.ControlReply(error=error_to_wire(error, blamed, epoch)))
        finally:
            self._reporting.discard(epoch)

    async def _try(self, reply: pb.ControlReply) -> None:
        try:
            await self.tell(reply)
        except SwarmError as lost:
            logger.info("session %s: the owner could not be told: %s", self._stage.session[:8], lost)
