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
        self.interrupted = False
        """By SIGINT, which is Ctrl-C."""

    @classmethod
    def on_signals(cls) -> Stopping:
        """By the first SIGTERM or SIGINT; after that the system's action is back, so a second one ends the process at
        once."""
        stopping, loop = cls(), asyncio.get_running_loop()

        def stop(by: signal.Signals) -> None:
            stopping.interrupted = by == signal.SIGINT
            stopping.asked.set()
            for number in SIGNALS:
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_DFL)  # Python's own for SIGINT would wait for threads

        for number in SIGNALS:
            loop.add_signal_handler(number, stop, number)
        return stopping

    async def unless(self, work: asyncio.Task[Any]) -> bool:
        """Wait for ``work``, or until told to stop: then cancel it. Whether it is done; raises what it raised."""
        asked = asyncio.create_task(self.asked.wait())
        await asyncio.wait((work, asked), return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if self.asked.is_set():
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)  # it may have failed because we stop
            return False
        work.result()
        return True
