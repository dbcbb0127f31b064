"""What happens in this gateway's generations, told to whoever watches: the console's pages.

Publishing never waits. A watcher has a bounded buffer; one that doesn't keep up loses the oldest events and is told
how many by :class:`Missed`.

    with hub.watch() as events:                  # or hub.watch(generation_id)
        async for event in events: ...

A generation's events come in this order: ``Began``, ``RouteTaken`` (again after each rebuild), ``TokenOut`` for each
token, ``Ended``. A watcher of one generation ends by itself after ``Ended``.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from swarm.types import HopTiming, Route

Source = Literal["completions", "chat", "console"]


@dataclass(frozen=True, slots=True)
class Began:
    generation: str
    """32 hexadecimal digits; the ``id`` of :class:`Ended`, of traces, and of nothing outside of the gateway."""
    source: Source
    prompt_tokens: int
    max_tokens: int
    at: float
    """Unix time."""


@dataclass(frozen=True, slots=True)
class RouteTaken:
    generation: str
    epoch: int
    route: Route
    reason: str
    """``opened``, or what happened to whom: then this is a rebuild."""
    stalled_s: float
    """Since the token before, or since the request: what the user waited for this route."""
    index: int
    """Of the next token."""
    cause: str = "opened"
    """``opened``, ``leaving``, or the code of the error by which a hop was lost."""


@dataclass(frozen=True, slots=True)
class TokenOut:
    generation: str
    index: int
    token_id: int
    text: str
    """What it adds to the text; may be empty."""
    gap_s: float
    """Since the token before; for the first one since the request."""
    hops: tuple[HopTiming, ...]
    """Queue, compute and link to the next hop, in seconds by each hop's own clock, in route order."""


@dataclass(frozen=True, slots=True)
class Ended:
    generation: str
    finish_reason: str
    """``stop``, ``length``, ``cancelled`` (the client went away, or the gateway ends) or ``error``."""
    tokens: int
    rebuilds: int
    ttft_s: float
    """0 without a token."""
    tokens_per_second: float
    error_code: str = ""
    error_message: str = ""


@dataclass(frozen=True, slots=True)
class Missed:
    """This watcher was too slow."""

    events: int


GenerationEvent = Began | RouteTaken | TokenOut | Ended
WatchEvent = GenerationEvent | Missed


@dataclass(slots=True, eq=False)
class Watch:
    """Iterate it once; :meth:`GenerationHub.watch` makes it."""

    generation: str | None
    limit: int
    _events: deque[GenerationEvent] = field(default_factory=deque)
    _missed: int = 0
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _over: bool = False

    def push(self, event: GenerationEvent) -> None:
        if self.generation is not None and event.generation != self.generation:
            return
        if len(self._events) >= self.limit:
            self._events.popleft()
            self._missed += 1
        self._events.append(event)
        self._wake.set()

    def close(self) -> None:
        """What is buffered is still given out, then the iteration ends."""
        self._over = True
        self._wake.set()

    async def __aiter__(self) -> AsyncIterator[WatchEvent]:
        while True:
            if self._missed:
                missed, self._missed = self._missed, 0
                yield Missed(missed)
            while self._events:
                event = self._events.popleft()
                yield event
                if isinstance(event, Ended) and self.generation is not None:
                    return
            if self._over:
                return
            await self._wake.wait()
            self._wake.clear()


class GenerationHub:
    """All methods are for the event loop's thread."""

    def __init__(self, buffer_events: int) -> None:
        """``buffer_events``: how far a watcher may be behind."""
        self._buffer_events = buffer_events
        self._watches: set[Watch] = set()
        self.closed = False
        self.observers: list[Callable[[GenerationEvent], None]] = []
        """Called at once with each event: what they do has to be quick."""

    def publish(self, event: GenerationEvent) -> None:
        for observe in self.observers:
            observe(event)
        for watch in self._watches:
            watch.push(event)

    @contextmanager
    def watch(self, generation: str | None = None) -> Iterator[Watch]:
        """Events from now on: of one generation, or of all."""
        watch = Watch(generation, self._buffer_events)
        self._watches.add(watch)
        try:
            yield watch
        finally:
            self._watches.discard(watch)

    def close(self) -> None:
        """The gateway ends: so does every watch."""
        self.closed = True
        for watch in self._watches:
            watch.close()
