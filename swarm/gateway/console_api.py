"""``/api/…``: what stands behind the console and ``swarm peers``, as JSON."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from swarm.commands.status import as_event
from swarm.errors import BadRequest, SwarmError
from swarm.gateway.answers import STILL_HERE
from swarm.gateway.buffer import Buffer
from swarm.gateway.console_events import Story, began_message, end_message, error_message
from swarm.gateway.console_guard import check_change, check_control, why_no_control
from swarm.gateway.console_live import Live
from swarm.gateway.failures import said
from swarm.gateway.hub import Ended
from swarm.gateway.local_peers import OwnPeer, PeerSpec
from swarm.gateway.requests import read_body
from swarm.gateway.state import GatewayState
from swarm.transcript import GenerationRequest

MAX_MESSAGES = 256

STREAM_HEADERS = {"x-accel-buffering": "no"}
"""Proxies that would hold events back are asked not to."""


Body = TypeVar("Body", bound=BaseModel)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StartBody(_Body):
    """A peer to start; what is left out has its default."""

    layers: str = "auto"
    device: str = "auto"
    max_memory_mb: int = 0
    threads: int = 1
    model: str = ""
    """Empty: the gateway's."""
    host_maddrs: str = ""


class MessageBody(_Body):
    role: Literal["system", "user", "assistant"]
    content: str


class GenerateBody(_Body):
    prompt: str | None = None
    messages: Annotated[list[MessageBody], Field(max_length=MAX_MESSAGES)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> GenerateBody:
        if bool(self.prompt) == bool(self.messages):
            raise ValueError("give a prompt or messages")
        return self


async def _parsed(request: Request, kind: type[Body], state: GatewayState) -> Body:
    try:
        return kind.model_validate_json(await read_body(request, state.settings.gateway) or b"{}")
    except ValidationError as error:
        raise BadRequest(in_words(error)) from None


def in_words(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    told = said(first["type"], first["msg"])
    return f"{where}: {told}" if where else told


def start_peer(state: GatewayState, live: Live, body: StartBody) -> OwnPeer:
    spec = PeerSpec(
        model=body.model or live.model_reference(),
        dtype=state.client.profile.dtype,
        weights=state.client.profile.weights,
        layers=body.layers,
        device=body.device,
        max_memory_mb=body.max_memory_mb,
        threads=body.threads,
        host_maddrs=body.host_maddrs,
    )
    return state.local_peers.start(spec, live.join_addresses())


def add_routes(router: APIRouter, state: GatewayState, live: Live) -> None:
    access, local = state.access, state.local_peers

    @router.get("/api/token")
    async def token() -> dict[str, str]:
        """For programs on this machine: what ``X-Swarm-Token`` has to say. Pages of other origins can't read it."""
        return {"token": access.control_token}

    @router.get("/api/status")
    async def status() -> dict[str, Any]:
        return as_event(await live.status()) | {"own": local.names()}

    @router.get("/api/join")
    async def join() -> dict[str, Any]:
        return live.join()

    @router.get("/api/peers")
    async def peers(request: Request) -> dict[str, Any]:
        return {"peers": [peer.as_json() for peer in local.peers()], "why_no_control": why_no_control(request, access)}

    @router.post("/api/peers", status_code=201)
    async def start(request: Request) -> dict[str, Any]:
        check_control(request, access)
        return start_peer(state, live, await _parsed(request, StartBody, state)).as_json()

    @router.get("/api/peers/{name}")
    async def peer(name: str) -> dict[str, Any]:
        return local.peer(name).as_json()

    @router.get("/api/peers/{name}/log")
    async def log(name: str) -> dict[str, str]:
        return {"log": local.log(name)}

    @router.post("/api/peers/{name}/drain")
    async def drain(name: str, request: Request) -> dict[str, Any]:
        check_control(request, access)
        return local.drain(name).as_json()

    @router.post("/api/peers/{name}/kill")
    async def kill(name: str, request: Request) -> dict[str, Any]:
        check_control(request, access)
        return local.kill(name).as_json()

    @router.post("/api/generate")
    async def generate(request: Request) -> StreamingResponse:
        check_change(request, access)
        body = await _parsed(request, GenerateBody, state)
        asked = await asyncio.to_thread(_request, state, body)  # a long text would hold up everybody's tokens
        return StreamingResponse(_generation(state, asked), media_type="text/event-stream", headers=STREAM_HEADERS)


def _request(state: GatewayState, body: GenerateBody) -> GenerationRequest:
    client = state.client
    if body.messages:
        prompt: str | list[int] = client.chat_prompt([{"role": m.role, "content": m.content} for m in body.messages])
    else:
        prompt = body.prompt or ""
    return client.request(
        prompt, max_tokens=body.max_tokens, temperature=body.temperature, top_p=body.top_p, seed=body.seed
    )


async def _generation(state: GatewayState, request: GenerationRequest) -> AsyncIterator[str]:
    """Server-sent events; what goes wrong is the last of them. Closing it frees every stage."""
    yield began_message(len(request.prompt))
    settings = state.settings.gateway
    buffer: Buffer[str] = Buffer(settings.max_buffered_tokens, settings.slow_reader_s)
    telling = asyncio.create_task(_tell(state, request, buffer))
    try:
        while (message := await buffer.get(settings.keep_alive_s)) != "":
            yield STILL_HERE if message is None else message
    except SwarmError as error:
        yield error_message(error.code, error.message)
    finally:
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)


async def _tell(state: GatewayState, request: GenerationRequest, buffer: Buffer[str]) -> None:
    """A generation's messages, then an empty one; a browser that reads nothing ends it."""
    loop, name = asyncio.get_running_loop(), secrets.token_hex(16)
    try:
        async with state.generations.reserve(1) as reservation:
            story = Story(loop.time(), state.local_peers.names())
            with state.hub.watch(name) as watch:
                stream = reservation.stream(request, source="console", generation=name)
                async with contextlib.aclosing(stream) as events:
                    async for event in events:
                        story.own = state.local_peers.names()
                        await buffer.put(story.tell(event, loop.time()))
                async for told in watch:
                    if isinstance(told, Ended):
                        await buffer.put(end_message(told))
        await buffer.put("")
    except BaseException as error:
        buffer.fail(error)
        raise
