"""An event loop on a thread of its own, for programs without asyncio."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import TypeVar

from swarm.errors import Cancelled

T = TypeVar("T")

STOP_S = 10.0
"""For its tasks to end."""


class NetworkThread:
    def __init__(self, clean_up_s: float) -> None:
        """``clean_up_s``: what cancelled work may take to clean up."""
        self._clean_up_s = clean_up_s
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop = self._runner.get_loop()
        self._thread = threading.Thread(target=self._serve, name="swarm-network", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def lives(self) -> bool:
        """False in a process that was forked from the one that started it: threads stay behind."""
        return self._thread.is_alive()

    @property
    def is_current(self) -> bool:
        """Who waits here waits for itself."""
        return threading.current_thread() is self._thread

    def begin(self, work: Awaitable[T]) -> Callable[[], T]:
        """Starts ``work``; returns what waits for it. Ctrl-C cancels it, and waits until it has cleaned up.

        The wait raises :class:`Cancelled` if the thread is ended meanwhile.
        """
        done: concurrent.futures.Future[T] = concurrent.futures.Future()
        cleaned_up = threading.Event()
        task: asyncio.Task[T] | None = None

        async def run() -> T:
            return await work

        def start() -> None:
            nonlocal task
            task = self._loop.create_task(run())
            task.add_done_callback(finish)

        def finish(ended: asyncio.Task[T]) -> None:
            if isinstance(work, Coroutine):
                work.close()  # cancelled at once, it never began
            if ended.cancelled():
                done.cancel()
            elif (error := ended.exception()) is not None:
                done.set_exception(error)
            else:
                done.set_result(ended.result())
            cleaned_up.set()

        def give_up() -> None:  # comes after start, if that came at all
            if task is not None:
                task.cancel()
            elif isinstance(work, Coroutine):
                work.close()

        def wait() -> T:
            try:
                return done.result()
            except concurrent.futures.CancelledError:
                raise Cancelled("the client was closed") from None
            except BaseException:
                if not done.done():
                    self._loop.call_soon_threadsafe(give_up)
                    cleaned_up.wait(self._clean_up_s)
                raise

        try:
            self._loop.call_soon_threadsafe(start)
        except BaseException:  # Ctrl-C: what has begun by now can't be closed, as others may be within it
            self._loop.call_soon_threadsafe(give_up)
            raise
        return wait

    def end(self) -> None:
        """Cancels what still runs."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_S)

    def _serve(self) -> None:
        with self._runner:  # which ends tasks and generators that are left
            self._loop.run_forever()
