"""Work that gives way to the end of the process."""

from __future__ import annotations

import asyncio

from peers.stopping import Stopping
from swarm.errors import Cancelled


async def test_work_that_fails_because_it_stops_is_not_done() -> None:
    stopping = Stopping()

    async def work() -> None:
        raise Cancelled("stopped while it loaded")

    stopping.asked.set()
    assert not await stopping.unless(asyncio.create_task(work()))
