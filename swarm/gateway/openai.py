"""OpenAI's routes for text generation: ``/v1/models``, ``/v1/completions``, ``/v1/chat/completions``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from swarm.gateway.answers import streamed, while_connected
from swarm.gateway.bodies import ChatBody, CompletionBody, GenerationBody
from swarm.gateway.choices import Text, collected, pieces
from swarm.gateway.failures import BadField
from swarm.gateway.formats import ChatFormat, CompletionFormat, Format
from swarm.gateway.generations import LiveGeneration
from swarm.gateway.hub import Source
from swarm.gateway.planning import Asked, check_model, plan_chat, plan_completion
from swarm.gateway.requests import check_access, parsed
from swarm.gateway.state import GatewayState

PREFIX = "/v1"


class CrossOrigin(CORSMiddleware):
    """Pages of other sites may use these routes; what the console can do stays with its own pages."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(f"{PREFIX}/"):
            await super().__call__(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def router(state: GatewayState) -> APIRouter:
    """All routes check the key and the name by which they are called."""
    routes = APIRouter(prefix=PREFIX)
    profile, started = state.client.profile, int(time.time())
    told = {"identity": profile.model_id, "precision": profile.precision}  # a name may stand for several models
    model = {"id": profile.name, "object": "model", "created": started, "owned_by": "swarm", **told}

    @routes.get("/models")
    async def models(request: Request) -> dict[str, Any]:
        check_access(request, state.access)
        return {"object": "list", "data": [model]}

    @routes.get("/models/{name:path}")
    async def one_model(request: Request, name: str) -> dict[str, Any]:
        check_access(request, state.access)
        check_model(name, state.client)
        return model

    @routes.post("/completions")
    async def completions(request: Request) -> Response:
        check_access(request, state.access)
        body = await parsed(request, CompletionBody, state.settings.gateway)
        asked = await plan_completion(body, state.client, state.settings)
        form = CompletionFormat(asked, profile, state.client.tokenizer, body.logprobs, echo=bool(body.echo))
        return await _answer(state, request, body, asked, form, body.best_of or 0)

    @routes.post("/chat/completions")
    async def chat(request: Request) -> Response:
        check_access(request, state.access)
        body = await parsed(request, ChatBody, state.settings.gateway)
        asked = await plan_chat(body, state.client, state.settings)
        alternatives = (body.top_logprobs or 0) if body.logprobs else None
        form = ChatFormat(asked, profile, state.client.tokenizer, alternatives)
        return await _answer(state, request, body, asked, form, 0)

    return routes


async def _answer(
    state: GatewayState, request: Request, body: GenerationBody, asked: Asked, form: Format, best_of: int
) -> Response:
    if body.stream_options is not None and not body.stream:
        raise BadField("stream_options is only allowed when stream is true", "stream_options")
    headers = {"x-request-id": asked.name}
    if body.stream:
        chunks = _chunks(state, asked, form, with_usage=body.wants_usage)
        return await streamed(request, chunks, state.settings.gateway.slow_reader_s, headers)
    texts, reused = await while_connected(request, _texts(state, asked, form.source))
    tokens = sum(len(text.tokens) for text in texts)
    if best_of > asked.n and asked.requests:
        texts = _best(texts, best_of, asked.n)
    return JSONResponse(form.whole(texts, tokens, reused), headers=headers)


async def _texts(state: GatewayState, asked: Asked, source: Source) -> tuple[list[Text], int]:
    """And how many tokens of the prompts were kept from before."""
    if not asked.requests:  # max_tokens is 0
        return [Text(finish_reason="length") for _ in range(len(asked.prompts) * asked.n)], 0
    async with state.generations.reserve(len(asked.requests)) as places:
        live = [
            places.stream(one, asked.stops, source=source, generation=asked.generation(index))
            for index, one in enumerate(asked.requests)
        ]
        return await collected(live, state.settings.gateway), _reused(asked, live)


async def _chunks(
    state: GatewayState, asked: Asked, form: Format, *, with_usage: bool
) -> AsyncGenerator[dict[str, Any] | None, None]:
    """None: nothing has come for a while, but it goes on."""
    tokens = reused = 0
    usage: dict[str, Any] = {"usage": None} if with_usage else {}
    if not asked.requests:
        for index in range(len(asked.prompts) * asked.n):
            for chunk in (*form.opening(index), form.closing(index, "length")):
                yield chunk | usage
    else:
        async with state.generations.reserve(len(asked.requests)) as places:
            live = [
                places.stream(one, asked.stops, source=form.source, generation=asked.generation(index))
                for index, one in enumerate(asked.requests)
            ]
            async with contextlib.aclosing(pieces(live, state.settings.gateway)) as coming:
                async for piece in coming:
                    if piece is None:
                        yield None
                        continue
                    if piece.token is not None:
                        tokens += 1
                        made = form.token(piece.index, piece.token)
                    elif piece.finish_reason is not None:
                        made = [form.closing(piece.index, piece.finish_reason)]
                    else:
                        made = form.opening(piece.index)
                    for chunk in made:
                        yield chunk | usage
            reused = _reused(asked, live)
    if with_usage:
        yield form.usage_chunk(tokens, reused)


def _reused(asked: Asked, live: Sequence[LiveGeneration]) -> int:
    """Tokens of the prompts, each counted once, that the peers had from earlier sessions."""
    first = live[:: len(live) // len(asked.prompts)]
    return sum(one.result.reused_tokens for one in first if one.result is not None)


def _best(texts: Sequence[Text], best_of: int, n: int) -> list[Text]:
    """Of each prompt's ``best_of`` texts the ``n`` with the highest log-probability a token, best first."""
    kept: list[Text] = []
    for start in range(0, len(texts), best_of):
        kept += sorted(texts[start : start + best_of], key=lambda text: -text.mean_logprob)[:n]
    return kept
