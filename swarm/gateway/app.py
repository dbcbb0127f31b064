"""The gateway's application: which routes there are."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from swarm.chrome_trace import chrome_trace
from swarm.errors import BadRequest, SwarmError
from swarm.gateway import console, openai
from swarm.gateway.counting import add_metrics
from swarm.gateway.failures import http_error, swarm_error, unexpected
from swarm.gateway.requests import check_access
from swarm.gateway.state import GatewayState


def create_app(state: GatewayState) -> FastAPI:
    """OpenAI's routes and the console over ``state``, whose client has been entered and outlives the application."""
    app = FastAPI(title="Swarm", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(SwarmError, swarm_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, unexpected)
    add_metrics(app, state)
    app.include_router(openai.router(state))
    _add_health(app, state)
    _add_traces(app, state)
    app.include_router(console.router(state))
    if origins := state.settings.gateway.cors_origins:
        app.add_middleware(
            openai.CrossOrigin,
            allow_origins=origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("retry-after", "x-request-id"),
        )
    app.add_middleware(AnswerHead)
    return app


class AnswerHead:
    """HEAD as GET, for what looks whether a page is there; the server leaves the body out. Feeds would never end."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD" and not scope["path"].startswith("/live/"):
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)


def _add_health(app: FastAPI, state: GatewayState) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        """200 while every layer is served, 503 otherwise; open to everybody, for load balancers."""
        coverage = state.generations.coverage()
        gate = state.generations.gate
        body = {
            "status": "ok" if coverage.complete else "missing layers",
            "model": state.client.profile.model_id,
            "swarm": coverage.sentence(),
            "missing": [[gap.start, gap.end] for gap in coverage.missing],
            "running": gate.taken,
            "waiting": gate.waiting,
        }
        return JSONResponse(body, 200 if coverage.complete else 503)


class NoTrace(SwarmError):
    code, http_status = "no_trace", 404


def _add_traces(app: FastAPI, state: GatewayState) -> None:
    traces = state.generations.traces

    @app.get("/api/traces")
    async def all_traces(request: Request) -> dict[str, Any]:
        check_access(request, state.access)
        return {"traces": traces.newest()}

    @app.get("/api/traces/{name}")
    async def one_trace(request: Request, name: str, format: str = "chrome") -> Response:
        """``name`` is the ``id`` of an answer; ``format``: ``chrome`` (for Perfetto), or ``swarm`` (for swarm why)."""
        check_access(request, state.access)
        trace = traces.get(name.removeprefix("chatcmpl-").removeprefix("cmpl-"))
        if trace is None:
            raise NoTrace(f"there is no trace of {name[:60]!r}; /api/traces names those that are kept")
        if format not in ("chrome", "swarm"):
            raise BadRequest("format is chrome or swarm")
        return JSONResponse(chrome_trace(trace) if format == "chrome" else asdict(trace))
