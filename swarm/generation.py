"""One generation as a client sees it: text, tokens, the route and its changes, times."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from swarm.errors import Cancelled
from swarm.rebuilds import Rebuild
from swarm.session import RouteChanged
from swarm.stops import StopFinder
from swarm.trace import MAX_TOKENS, Trace, TracedToken
from swarm.transcript import GenerationRequest
from swarm.types import Route, Token

if TYPE_CHECKING:
    from swarm.client import AsyncClient


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds as the client saw them."""

    ttft_s: float
    """From the call to the first token."""
    tokens_per_second: float
    """Between the first and the last token."""
    longest_gap_s: float


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished generation."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str
    """``stop`` (end of text, or a stop string) or ``length``."""
    route: Route
    rebuilds: list[Rebuild]
    timings: Timings
    trace: Trace
    reused_tokens: int = 0
    """Of the prompt: every stage had them from an earlier session."""


@dataclass(slots=True)
class _Clock:
    """Token times of one generation."""

    began: float
    times: list[float] = field(default_factory=list)

    def latest_gap_s(self) -> float:
        return self.times[-1] - (self.times[-2] if len(self.times) > 1 else self.began)

    def timings(self) -> Timings:
        times = self.times
        gaps = [b - a for a, b in itertools.pairwise(times)]
        span = times[-1] - times[0] if times else 0.0
        return Timings(
            ttft_s=times[0] - self.began if times else 0.0,
            tokens_per_second=len(gaps) / span if span > 0 else 0.0,
            longest_gap_s=max(gaps, default=0.0),
        )


class AsyncStream:
    """A generation under way: iterate it for :class:`RouteChanged` and :class:`Token`; then :attr:`result`."""

    def __init__(self, client: AsyncClient, request: GenerationRequest, stop: str | Sequence[str] | None) -> None:
        self._client = client
        self.request = request
        self._stop = stop
        self.result: Generation | None = None

    async def __aiter__(self) -> AsyncGenerator[RouteChanged | Token, None]:
        client, request = self._client, self.request
        loop = asyncio.get_running_loop()
        clock = _Clock(loop.time())
        session = client.session(request)
        detokenizer, stops = client.tokenizer.stream(), StopFinder(self._stop)
        token_ids: list[int] = []
        text: list[str] = []
        trace: deque[TracedToken] = deque(maxlen=MAX_TOKENS)
        route: Route | None = None
        async with session, contextlib.aclosing(session.events()) as events:
            async for event in events:
                if isinstance(event, RouteChanged):
                    route = event.route
                    yield event
                    continue
                clock.times.append(loop.time())
                trace.append(TracedToken(event.index, clock.latest_gap_s(), event.hops))
                token_ids.append(event.token_id)
                is_end = event.token_id in request.end_ids
                piece = stops.push("" if is_end else detokenizer.push(event.token_id))
                last = stops.found or (session.finish_reason is not None and not session.transcript.fresh)
                if last and not stops.found:
                    piece += stops.push(detokenizer.flush()) + stops.flush()
                text.append(piece)
                yield Token(event.index, event.token_id, piece, event.hops, event.logprob, event.top_logprobs)
                if last:
                    break
        if route is None:
            raise Cancelled("the generation ended before it began")
        self.result = Generation(
            text="".join(text),
            token_ids=token_ids,
            prompt_tokens=len(request.prompt),
            finish_reason="stop" if stops.found else session.finish_reason or "stop",
            route=route,
            rebuilds=session.rebuilds,
            timings=clock.timings(),
            trace=Trace(client.profile.model_id, len(request.prompt), tuple(trace), client.predict(route, request)),
            reused_tokens=session.reused,
        )
