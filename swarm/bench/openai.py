"""Any server that speaks OpenAI's completions protocol, as a contender."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPException
from typing import Any

from swarm.bench.runs import Run
from swarm.errors import BadRequest, SwarmError

TIMEOUT_S = 120.0
"""For any answer, and between two parts of a streamed one."""


class OpenAIContender:
    """Streams ``/v1/completions``. A part of the answer counts as a token: servers stream token by token."""

    def __init__(self, url: str, model: str, decode: Callable[[Sequence[int]], str]) -> None:
        """``url`` ends with the version, as in ``http://127.0.0.1:8080/v1``."""
        self._url = url.rstrip("/")
        self._decode = decode
        self.pids: list[int] = []
        self._model = model

    async def generate(self, prompt: Sequence[int], max_tokens: int) -> Run:
        return await asyncio.to_thread(self._generate, self._decode(prompt), max_tokens)

    def _generate(self, prompt: str, max_tokens: int) -> Run:
        wish = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,  # vLLM's and llama.cpp's; others pass over it, and their text may end earlier
        }
        began = time.perf_counter()
        times = [time.perf_counter() - began for _ in self._parts("/completions", wish)]
        if len(times) < 2:
            raise SwarmError(f"{self._url} gave {len(times)} parts of text, too few to measure")
        return Run([0] * len(times), times)

    def _parts(self, path: str, wish: dict[str, Any]) -> Iterator[str]:
        """Of server-sent events (WHATWG HTML, 9.2), those with text."""
        request = urllib.request.Request(
            self._url + path, data=json.dumps(wish).encode(), headers={"Content-Type": "application/json"}
        )
        with _ask(request) as answer:
            try:
                for line in answer:
                    data = line.decode("utf-8", "replace").removeprefix("data:").strip()
                    if not line.startswith(b"data:") or data == "[DONE]":
                        continue
                    text = json.loads(data)["choices"][0]["text"]
                    if text:
                        yield text
            except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
                raise SwarmError(f"{self._url} broke off: {error}") from None


def model_at(url: str, wanted: str | None) -> str:
    """The one that is ``wanted`` of the server at ``url``, or else the first of its list.

    Raises :class:`BadRequest` for another kind of URL, :class:`SwarmError` if nobody answers there.
    """
    if not url.startswith(("http://", "https://")):
        raise BadRequest(f"{url!r} is no http or https URL")
    if wanted:
        return wanted
    address = f"{url.rstrip('/')}/models"
    with _ask(urllib.request.Request(address)) as answer:
        try:
            return str(json.load(answer)["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise SwarmError(f"{address} names no model") from None


def _ask(request: urllib.request.Request) -> Any:
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        with error:
            raise SwarmError(f"{request.full_url} answered {error.code}: {error.read(200)!r}") from None
    except (OSError, ValueError, HTTPException) as error:
        raise SwarmError(f"{request.full_url} does not answer: {error}") from None
