"""Any server that speaks OpenAI's completions protocol, as a contender."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import httpx

from swarm.bench.runs import Run
from swarm.errors import BadRequest, SwarmError

TIMEOUT_S = 120.0
"""For any answer to begin, and between two parts of one ..."""
ANSWER_S = 900.0
"""... and for all of it: what answers may be anything, and need not end."""
MAX_ANSWER_BYTES = 16 * 1024 * 1024
TOLD = 200
"""Characters of what a server says when it refuses."""


@dataclass(frozen=True, slots=True)
class OpenAIServer:
    """Raises :class:`BadRequest` for another kind of URL, or a key that can't be sent."""

    url: str
    """Ends with the version, as in ``http://127.0.0.1:8080/v1``."""
    key: str = field(default="", repr=False)
    """Sent as a bearer token, unless it is empty."""

    def __post_init__(self) -> None:
        try:
            wrong = "" if self.url.startswith(("http://", "https://")) and httpx.URL(self.url).host else "no server"
        except httpx.InvalidURL as error:
            wrong = str(error)
        if wrong:
            raise BadRequest(f"{self.url!r} is no http or https URL: {wrong}")
        if self.key != self.key.strip() or not (self.key.isascii() and self.key.isprintable()):
            raise BadRequest("the key for --url has spaces around it or characters beyond ASCII: no server takes it")

    async def first_model(self) -> str:
        """The first of its list; raises :class:`SwarmError`."""
        body = b"".join([data async for data in self._answer("GET", "/models", None)])
        try:
            return str(json.loads(body)["data"][0]["id"])
        except (ValueError, LookupError, TypeError, RecursionError):
            raise SwarmError(f"{self.url}/models names no model; is this the server's URL up to the version?") from None

    async def parts(self, path: str, wish: dict[str, Any]) -> AsyncGenerator[str, None]:
        """Of server-sent events (WHATWG HTML, 9.2), those with text; raises :class:`SwarmError`."""
        rest = b""
        async with aclosing(self._answer("POST", path, wish)) as answer:
            async for data in answer:
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    if text := self._text(line):
                        yield text
        if text := self._text(rest):
            yield text

    def _text(self, line: bytes) -> str:
        data = line.decode("utf-8", "replace").removeprefix("data:").strip()
        if not line.startswith(b"data:") or data == "[DONE]":
            return ""
        try:
            return str(json.loads(data)["choices"][0]["text"] or "")
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise SwarmError(f"{self.url} sent what is no part of a completion: {error!r}") from None

    async def _answer(self, method: str, path: str, wish: dict[str, Any] | None) -> AsyncGenerator[bytes, None]:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        url = self.url.rstrip("/") + path
        try:
            async with (
                asyncio.timeout(ANSWER_S),
                httpx.AsyncClient(headers=headers, timeout=TIMEOUT_S) as client,
                client.stream(method, url, json=wish) as response,
            ):
                async for data in response.aiter_bytes():
                    if response.status_code != 200:
                        told = " ".join(data.decode("utf-8", "replace").split())[:TOLD]
                        raise SwarmError(f"{url} answered {response.status_code}: {told}")
                    yield data
                    if response.num_bytes_downloaded > MAX_ANSWER_BYTES:
                        raise SwarmError(f"{url} answers without end")
                if response.status_code != 200:
                    raise SwarmError(f"{url} answered {response.status_code}")
        except (httpx.HTTPError, OSError, ValueError) as error:  # TimeoutError is an OSError
            raise SwarmError(f"{url} does not answer, or breaks off: {error!r}") from None


class OpenAIContender:
    """Streams ``/v1/completions``. A part of the answer counts as a token: servers stream token by token."""

    def __init__(self, server: OpenAIServer, model: str, decode: Callable[[Sequence[int]], str]) -> None:
        self._server = server
        self._model = model
        self._decode = decode
        self.pids: list[int] = []

    async def generate(self, prompt: Sequence[int], max_tokens: int) -> Run:
        wish = {
            "model": self._model,
            "prompt": self._decode(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,  # vLLM's and llama.cpp's; others pass over it, and their text may end earlier
        }
        began = time.perf_counter()
        async with aclosing(self._server.parts("/completions", wish)) as parts:
            times = [time.perf_counter() - began async for _ in parts]
        if len(times) < 2:
            raise SwarmError(f"{self._server.url} gave {len(times)} parts of text, too few to measure")
        return Run([], times)
