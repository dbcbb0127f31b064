"""The console: its pages and what they fetch. ``/api/…`` is in :mod:`swarm.gateway.console_api`."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qsl

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from pydantic import ValidationError

from swarm.errors import BadRequest, SwarmError
from swarm.gateway import console_api
from swarm.gateway.console_api import StartBody, in_words, start_peer
from swarm.gateway.console_guard import COOKIE, SIGN_IN, check_control, cookie_value, guarded, why_no_control
from swarm.gateway.console_live import Live
from swarm.gateway.requests import read_body
from swarm.gateway.state import GatewayState

PAGES = {"/": ("generate", "Generate"), "/swarm": ("swarm", "Swarm"), "/peers": ("peers", "Peers")}
MEDIA_TYPES = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml", "txt": "text/plain"}


def router(state: GatewayState) -> APIRouter:
    live = Live(state)
    routes = APIRouter(route_class=guarded(state.access))
    console_api.add_routes(routes, state, live)
    for path in PAGES:
        routes.get(path)(_page(path, state, live))
    _add_fragments(routes, state, live)
    _add_sign_in(routes, state, live)
    _add_static(routes)
    return routes


def _page(path: str, state: GatewayState, live: Live) -> Callable[[Request], Any]:
    name, title = PAGES[path]

    async def page(request: Request) -> HTMLResponse:
        now = await live.map()
        denied = why_no_control(request, state.access)
        html = live.render(
            f"{name}.html",
            page=name,
            title=title,
            pages=[(to, label) for to, (_, label) in PAGES.items()],
            path=path,
            token=state.access.control_token,
            why_no_control=denied,
            has_chat=state.client.tokenizer.has_chat_template,
            defaults=state.settings.inference,
            fragments=await live.fragments(name, control=not denied),
            layers=request.query_params.get("layers", "auto"),
            reference=live.model_reference(),
            map=now,
        )
        return HTMLResponse(html)

    return page


def _add_fragments(routes: APIRouter, state: GatewayState, live: Live) -> None:
    local, access = state.local_peers, state.access

    def answer(said: str, *, failed: bool = False) -> HTMLResponse:
        # 200 in both cases: htmx swaps nothing in for an error
        return HTMLResponse(live.render("_said.html", said=said, failed=failed))

    @routes.get("/live/{page}")
    async def feed(page: str, request: Request) -> StreamingResponse:
        return StreamingResponse(
            live.feed(page, control=not why_no_control(request, access)),
            media_type="text/event-stream",
            headers=console_api.STREAM_HEADERS,
        )

    @routes.post("/peers/start")
    async def start(request: Request) -> HTMLResponse:
        try:
            check_control(request, access)
            fields = dict(parse_qsl((await read_body(request, state.settings.gateway)).decode("utf-8", "replace")))
            peer = start_peer(state, live, StartBody.model_validate(fields))
        except ValidationError as error:
            return answer(in_words(error), failed=True)
        except SwarmError as error:
            return answer(error.message, failed=True)
        return answer(f"Peer {peer.name} is starting.")

    @routes.post("/peers/{name}/{action}")
    async def act(name: str, action: str, request: Request) -> HTMLResponse:
        try:
            check_control(request, access)
            if action not in ("drain", "kill"):
                raise BadRequest(f"a peer can be drained or killed, not {action[:20]!r}")
            (local.drain if action == "drain" else local.kill)(name)
        except SwarmError as error:
            return answer(error.message, failed=True)
        return answer(
            f"Peer {name} hands over its sessions and leaves." if action == "drain" else f"Peer {name} is killed."
        )

    @routes.get("/peers/{name}/log")
    async def log(name: str) -> HTMLResponse:
        return HTMLResponse(live.render("_log.html", peer=local.peer(name), log=local.log(name)))


def _add_sign_in(routes: APIRouter, state: GatewayState, live: Live) -> None:
    access = state.access

    @routes.get(SIGN_IN)
    async def sign_in_page() -> HTMLResponse:
        return HTMLResponse(live.render("sign_in.html", title="Sign in", wrong=False))

    @routes.post(SIGN_IN)
    async def sign_in(request: Request) -> Response:
        fields = dict(parse_qsl((await read_body(request, state.settings.gateway)).decode("utf-8", "replace")))
        if not access.api_key or not secrets.compare_digest(fields.get("key", "").encode(), access.api_key.encode()):
            return HTMLResponse(live.render("sign_in.html", title="Sign in", wrong=True), 401)
        response = RedirectResponse("/", 303)
        response.set_cookie(COOKIE, cookie_value(access), httponly=True, samesite="strict")
        return response


def _add_static(routes: APIRouter) -> None:
    folder = files("swarm.gateway") / "static"
    shipped = {item.name: item for item in folder.iterdir() if item.name.rpartition(".")[2] in MEDIA_TYPES}

    @routes.get("/static/{name}")
    async def static(name: str) -> Response:
        if name not in shipped:
            return Response("there is no such file", 404, media_type="text/plain")
        media_type = MEDIA_TYPES[name.rpartition(".")[2]]
        return Response(shipped[name].read_bytes(), media_type=media_type, headers={"cache-control": "max-age=300"})
