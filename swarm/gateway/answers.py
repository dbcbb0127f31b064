"""How an answer leaves: as long as the client is there, and no longer than it reads."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from swarm.errors import SwarmError
from swarm.gateway.failures import ClientGone, error_body
from swarm.gateway.requests import as_json

T = TypeVar("T")


STILL_HERE = ": still here\n\n"
"""A comment among server-sent events: no client reads it, and proxies see that the answer goes on."""


async def _gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """``work``'s result. It is cancelled, and has cleaned up, when the client goes away: raises :class:`ClientGone`."""
    working, gone = asyncio.create_task(work), asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        left = not working.done()
        await _end(working, gone)
    if left:
        raise ClientGone("the client went away")
    return working.result()


async def _end(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Server-sent events. The first chunk is there before the status is sent, so an error until then has its own.

    None among ``chunks`` becomes a comment. ``chunks`` is closed when the client goes away, or takes nothing for
    ``patience_s``. An error in the middle becomes the last event; a client can tell it from the end, which is
    ``[DONE]``.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        first: dict[str, Any],
        chunks: AsyncGenerator[dict[str, Any] | None, None],
        patience_s: float,
        headers: dict[str, str],
    ) -> None:
        super().__init__(headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._chunks = chunks
        self._patience_s = patience_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending, gone = asyncio.create_task(self._send(send)), asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            over = sending.done()
            await _end(sending, gone)
        if over:
            sending.result()

    async def _send(self, send: Send) -> None:
        async def write(message: dict[str, Any]) -> None:
            async with asyncio.timeout(self._patience_s):
                await send(message)

        async def part(body: bytes) -> None:
            await write({"type": "http.response.body", "body": body, "more_body": True})

        async def event(data: bytes) -> None:
            await part(b"data: " + data + b"\n\n")

        # A reader that is too slow is left alone with its half answer: the connection is closed without an end.
        with contextlib.suppress(TimeoutError):
            async with contextlib.aclosing(self._chunks):
                await write({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                try:
                    await event(as_json(self._first))
                    async for chunk in self._chunks:
                        await (part(STILL_HERE.encode()) if chunk is None else event(as_json(chunk)))
                    await event(b"[DONE]")
                except SwarmError as error:
                    await event(as_json(error_body(error)))
            await write({"type": "http.response.body", "body": b"", "more_body": False})


async def streamed(
    request: Request, chunks: AsyncGenerator[dict[str, Any] | None, None], patience_s: float, headers: dict[str, str]
) -> EventStream:
    """Wait for the first chunk; what is raised until then is raised here."""

    async def begin() -> dict[str, Any]:
        while (chunk := await anext(chunks)) is None:
            pass
        return chunk

    try:
        first = await while_connected(request, begin())
    except BaseException:
        await chunks.aclose()
        raise
    return EventStream(first, chunks, patience_s, headers)
