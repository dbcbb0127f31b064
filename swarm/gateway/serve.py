"""The application on a socket, in the event loop of the swarm's client."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
from collections.abc import Callable, Iterator

import h11
import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from swarm.config import GatewaySettings
from swarm.errors import BadRequest, PortInUse

BACKLOG = 512


class Server(uvicorn.Server):
    """Ends on SIGINT and SIGTERM, and then leaves both to the program again; the second one hurries it."""

    def __init__(
        self, app: FastAPI, settings: GatewaySettings, on_ready: Callable[[], None], on_exit: Callable[[], None]
    ) -> None:
        """``on_exit``: called once no more requests are taken, so that what would never end by itself ends."""
        super().__init__(
            uvicorn.Config(
                _cut_off_quietly(app),
                http=_impatient(settings.body_s),
                log_config=None,
                access_log=False,
                lifespan="off",
                limit_concurrency=settings.max_connections,
                timeout_graceful_shutdown=max(1, round(settings.finish_s)),
            )
        )
        self._on_ready, self._on_exit = on_ready, on_exit

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._on_exit()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)


def _impatient(head_s: float) -> type[H11Protocol]:
    """uvicorn's protocol, which closes a connection on which no request's head comes within ``head_s``.

    By itself it leaves a new connection open for ever, and each counts against ``gateway.max_connections``.
    """

    class Impatient(H11Protocol):
        _patience: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
            super().connection_made(transport)
            self._wait_for_head()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._wait_for_head()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._stop_waiting()

        def _wait_for_head(self) -> None:
            self._stop_waiting()
            self._patience = self.loop.call_later(head_s, self._give_up)

        def _stop_waiting(self) -> None:
            if self._patience is not None:
                self._patience.cancel()

        def _give_up(self) -> None:
            if self.conn.our_state in (h11.IDLE, h11.DONE):  # no request is under way
                self.timeout_keep_alive_handler()

    return Impatient


def _cut_off_quietly(app: ASGIApp) -> ASGIApp:
    """``app``, whose requests the server may cancel without a traceback."""

    async def cut_off_quietly(scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await app(scope, receive, send)

    return cut_off_quietly


def listen(host: str, port: int) -> socket.socket:
    """Bound, and listening once served. Raises :class:`PortInUse` or, for an address of others, :class:`BadRequest`."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except socket.gaierror as error:
        raise BadRequest(f"{host} is no address of this machine: {error.strerror}") from None
    except OSError as error:
        if isinstance(error, PermissionError):
            raise BadRequest(f"port {port} is not for this user; take one above 1023") from None
        kind = PortInUse if error.errno == errno.EADDRINUSE else BadRequest
        why = os.strerror(error.errno or 0)  # create_server adds the address to strerror
        raise kind(f"can't listen on {host} port {port}: {why}") from None
