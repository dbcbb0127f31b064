"""``swarm bench``: an OpenAI-compatible server as a contender, and the picture."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from swarm.bench.openai import OpenAIContender, OpenAIServer
from swarm.bench.plot import svg
from swarm.bench.sections import Figure
from swarm.errors import BadRequest, SwarmError


class Server(BaseHTTPRequestHandler):
    asked: ClassVar[list[dict[str, Any]]] = []
    parts: ClassVar[list[str]] = []
    key: ClassVar[str] = ""

    def do_GET(self) -> None:
        if self.key and self.headers["Authorization"] != f"Bearer {self.key}":
            self.send_error(401)
            return
        self._answer(json.dumps({"data": [{"id": "some-model"}]}).encode())

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        events = [f"data: {json.dumps({'choices': [{'text': part}]})}\n\n" for part in self.parts]
        self._answer("".join([*events, "data: [DONE]\n\n"]).encode())

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Server.asked.clear()
    Server.key = ""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join(10)
    server.server_close()


def decode(ids: Any) -> str:
    return " ".join(str(token) for token in ids)


def contender(url: str) -> OpenAIContender:
    return OpenAIContender(OpenAIServer(url), "some-model", decode)


@contextmanager
def raw_server(*answer: bytes, again: bytes = b"") -> Iterator[str]:
    """Sends ``answer`` to whoever connects, then ``again`` until nobody takes it."""
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            try:
                connection = listener.accept()[0]
            except OSError:
                return
            with connection:
                try:
                    connection.recv(65536)
                    connection.sendall(b"".join(answer))
                    while again:
                        connection.sendall(again)
                    if not answer:
                        ended.wait(20)
                except OSError:
                    pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        ended.set()
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def test_a_server_is_asked_for_a_stream_and_its_parts_are_tokens(url: str) -> None:
    Server.parts = ["one", "", " two", " three"]
    assert asyncio.run(OpenAIServer(url).first_model()) == "some-model"
    run = asyncio.run(contender(url).generate([7, 8], 3))
    assert len(run.times) == 3, "a part without text is none"
    assert run.times == sorted(run.times)
    (wish,) = Server.asked
    assert (wish["model"], wish["prompt"], wish["max_tokens"]) == ("some-model", "7 8", 3)
    assert wish["stream"] is True


def test_a_server_that_says_nothing_or_is_not_there_is_named(url: str) -> None:
    Server.parts = []
    with pytest.raises(SwarmError, match="too few"):
        asyncio.run(contender(url).generate([7], 3))
    with pytest.raises(SwarmError, match="does not answer"):
        asyncio.run(OpenAIServer("http://127.0.0.1:9/v1").first_model())
    with pytest.raises(BadRequest):
        OpenAIServer("file:///etc/passwd")


def test_a_server_may_want_a_key(url: str) -> None:
    Server.key = "secret"
    assert asyncio.run(OpenAIServer(url, "secret").first_model()) == "some-model"
    with pytest.raises(SwarmError, match="answered 401") as refused:
        asyncio.run(OpenAIServer(url, "guess").first_model())
    assert "guess" not in refused.value.message
    with pytest.raises(BadRequest, match="key"):
        OpenAIServer(url, "two\nlines")


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        OK + b"Content-Length: 900\r\n\r\n{",
        OK + b"Content-Length: 2\r\n\r\n{}",
        OK + b"Content-Length: 6\r\n\r\n<html>",
        OK + b"Content-Length: 4\r\n\r\n\xff\xfe\x00\x01",
        OK + b"Content-Length: 99999\r\n\r\n" + b"[" * 99999,
        OK + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd",
        b"HTTP/1.1 302 Found\r\nLocation: http://\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 500 Oh\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_a_server_that_answers_nonsense_is_an_error_of_ours(answer: bytes) -> None:
    with raw_server(answer) as url, pytest.raises(SwarmError, match="127"):
        asyncio.run(OpenAIServer(url).first_model())
    events = OK + b"\r\ndata: " + answer + b"\n"
    with raw_server(events) as url, pytest.raises(SwarmError, match="127"):
        asyncio.run(contender(url).generate([7], 3))


@pytest.mark.parametrize("again", [b"x" * 65536, b'data: {"choices": [{"text": "a"}]}\n' * 2000])
def test_an_answer_without_end_is_cut(again: bytes) -> None:
    with raw_server(OK + b"\r\n", again=again) as url, pytest.raises(SwarmError, match="without end"):
        asyncio.run(contender(url).generate([7], 3))


def test_a_wait_for_a_server_ends_when_it_is_interrupted() -> None:
    async def work(url: str) -> None:
        async with asyncio.timeout(0.3):
            await contender(url).generate([7], 3)

    began = time.monotonic()
    with raw_server() as url, pytest.raises(TimeoutError):
        asyncio.run(work(url))
    assert time.monotonic() - began < 10, "a thread was waited for"


def widths(figures: list[Figure]) -> list[float]:
    """Of the bars in the picture."""
    root = ElementTree.fromstring(svg(figures))
    background, *rectangles = root.iter("{http://www.w3.org/2000/svg}rect")
    assert background.attrib["width"] == "100%"
    return [float(bar.attrib["width"]) for bar in rectangles]


def test_the_picture_has_a_bar_for_each_figure() -> None:
    figures = [
        Figure("speed", "a < b & c", 10.0, "tokens/s"),
        Figure("speed", "d", 5.0, "tokens/s"),
        Figure("e", "f", 0, ""),
    ]
    bars = widths(figures)
    assert len(bars) == 3
    assert bars[0] == pytest.approx(2 * bars[1], rel=0.01)
    assert bars[2] == 0
    assert svg([])


def test_figures_of_one_section_and_unit_share_a_scale_in_the_picture() -> None:
    figures = [
        Figure("speed", "one", 10.0, "tokens/s"),
        Figure("speed", "one: first token", 70.0, "ms"),
        Figure("speed", "other", 40.0, "tokens/s"),
    ]
    one, other, _ = widths(figures)
    assert other == pytest.approx(4 * one, rel=0.01)
