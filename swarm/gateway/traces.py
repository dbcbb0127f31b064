"""Where the time of the newest generations went."""

from __future__ import annotations

from collections import OrderedDict

from swarm.trace import Trace

MAX_TOKENS = 32768
"""Of all traces together; some tens of megabytes."""


class TraceStore:
    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._traces: OrderedDict[str, Trace] = OrderedDict()
        self._tokens = 0

    def add(self, generation: str, trace: Trace) -> None:
        self._traces[generation] = trace
        self._tokens += len(trace.tokens)
        while self._traces and (len(self._traces) > self._limit or self._tokens > MAX_TOKENS):
            _, oldest = self._traces.popitem(last=False)
            self._tokens -= len(oldest.tokens)

    def get(self, generation: str) -> Trace | None:
        return self._traces.get(generation)

    def newest(self) -> list[str]:
        """The names of the generations, newest first."""
        return list(reversed(self._traces))
