"""Counts the answers of the OpenAI routes, and serves ``/metrics``."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI, Request, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from swarm.gateway.metrics import GatewayMetrics
from swarm.gateway.requests import check_access
from swarm.gateway.state import GatewayState
from swarm.telemetry import CONTENT_TYPE, rendered


class CountAnswers:
    """By route (without its parameters) and status, when the status is sent."""

    def __init__(self, app: ASGIApp, answered: Callable[[str, int], None]) -> None:
        self._app = app
        self._answered = answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                if route is not None and route.path.startswith("/v1/"):
                    self._answered(route.path, message["status"])
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)


def add_metrics(app: FastAPI, state: GatewayState) -> None:
    metrics = GatewayMetrics(state.generations)
    app.add_middleware(CountAnswers, answered=metrics.answered)

    @app.get("/metrics")
    async def scrape(request: Request) -> Response:
        check_access(request, state.access)
        return Response(rendered(metrics.registry), media_type=CONTENT_TYPE)
