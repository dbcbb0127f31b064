"""A process that is told to stop by a signal, and work that gives way to it."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopping:
    """``asked`` is set once the process is to stop."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    @classmethod
    def on_signals(cls) -> Stopping:
        """By the first SIGTERM or SIGINT; after that the default action is back, so a second one ends the process."""
        stopping, loop = cls(), asyncio.get_running_loop()

        def stop() -> None:
            stopping.asked.set()
            for number in SIGNALS:
                loop.remove_signal_handler(number)

        for number in SIGNALS:
            loop.add_signal_handler(number, stop)
        return stopping

    async def unless(self, work: asyncio.Task[Any]) -> bool:
        """Wait for ``work``, or until told to stop: then cancel it. Whether it is done; raises what it raised."""
        asked = asyncio.create_task(self.asked.wait())
        await asyncio.wait((work, asked), return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if not work.done():
            work.cancel()
            return False
        work.result()
        return True
