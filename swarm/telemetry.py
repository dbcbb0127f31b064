"""What a running process tells Prometheus.

Names are ``swarm_<process>_<what>_<base unit>``; every process has a registry of its own.
"""

from __future__ import annotations

import asyncio
import socket
from types import TracebackType
from typing import Self

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from swarm.errors import PortInUse

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Buckets for times of a token, a hop, a queue, a rebuild."""
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Buckets for sessions and rows of a batch."""

CONTENT_TYPE = CONTENT_TYPE_LATEST
MAX_REQUEST_BYTES = 8192
REQUEST_S = 5.0
MAX_SCRAPES = 16
"""Connections at once; more are closed."""


def rendered(registry: CollectorRegistry) -> bytes:
    """In Prometheus' text format, with :data:`CONTENT_TYPE`."""
    return generate_latest(registry)


def gauge(name: str, help_text: str, value: float) -> GaugeMetricFamily:
    """One number, for collectors that read it when they are asked."""
    return GaugeMetricFamily(name, help_text, value=value)


class MetricsServer:
    """``GET /metrics`` on a port of its own, for processes that serve nothing else over HTTP. An ``async with``."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        """``port`` 0: any free one. Entering raises :class:`PortInUse`."""
        self._registry = registry
        self._host, self.port = host, port
        self._open = 0

    async def __aenter__(self) -> Self:
        try:
            self._server = await asyncio.start_server(self._answer, self._host, self.port, limit=MAX_REQUEST_BYTES)
        except (OSError, socket.gaierror) as error:
            raise PortInUse(f"can't serve metrics at {self._host} port {self.port}: {error.strerror}") from None
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            async with asyncio.timeout(REQUEST_S):
                if self._open <= MAX_SCRAPES:
                    head = await reader.readuntil(b"\r\n\r\n")
                    writer.write(self._response(head.split(b" ", 2)))
                    await writer.drain()
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            pass  # no scraper: there is nobody to answer
        finally:
            self._open -= 1
            writer.close()

    def _response(self, request: list[bytes]) -> bytes:
        method, path = request[0], request[1].split(b"?")[0] if len(request) > 1 else b""
        if (method, path) == (b"GET", b"/metrics"):
            status, content_type, body = "200 OK", CONTENT_TYPE, rendered(self._registry)
        else:
            status, content_type, body = "404 Not Found", "text/plain", b"GET /metrics\n"
        head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        return f"{head}Connection: close\r\n\r\n".encode() + body
