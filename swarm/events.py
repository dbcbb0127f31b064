"""What the hops of a session have said and nobody has looked at yet."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING

from google.protobuf.message import Message

from swarm.control import Event, HopControl
from swarm.errors import ProtocolError

if TYPE_CHECKING:
    from swarm.handover import Handover

MAX_UNHEARD_BYTES = 64 * 1024 * 1024
"""Of one hop. More than an honest one says of a whole session, or in step mode of one input, whoever reads slowly."""
EVENT_BYTES = 512
"""What an event takes beside its own bytes."""

Said = tuple[HopControl, "Event | Handover"]


class Events:
    """A queue. A hop that says too much is given up; that is the last thing heard of it."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Said] = asyncio.Queue()

    def put(self, control: HopControl, event: Event | Handover) -> None:
        if isinstance(event, Message) and control.unheard_bytes > MAX_UNHEARD_BYTES:
            event = ProtocolError(f"more than {MAX_UNHEARD_BYTES} bytes of what this hop says wait to be heard")
            control.abort(event)
        control.unheard_bytes += _size(event)
        self._queue.put_nowait((control, event))

    async def get(self) -> Said:
        return self._taken(await self._queue.get())

    def waiting(self) -> Iterator[Said]:
        """Take what waits now, one after the other."""
        for _ in range(self._queue.qsize()):
            yield self._taken(self._queue.get_nowait())

    @staticmethod
    def _taken(said: Said) -> Said:
        control, event = said
        control.unheard_bytes -= _size(event)
        return said


def _size(event: Event | Handover) -> int:
    return EVENT_BYTES + (event.ByteSize() if isinstance(event, Message) else 0)
