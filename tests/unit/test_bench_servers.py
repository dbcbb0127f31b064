"""``swarm bench``: an OpenAI-compatible server as a contender, and the picture."""

from __future__ import annotations

import asyncio
import json
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest

from swarm.bench.openai import OpenAIContender, model_at
from swarm.bench.plot import svg
from swarm.bench.sections import Figure
from swarm.errors import BadRequest, SwarmError


class Server(BaseHTTPRequestHandler):
    asked: ClassVar[list[dict[str, Any]]] = []
    parts: ClassVar[list[str]] = []

    def do_GET(self) -> None:
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
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join(10)
    server.server_close()


def decode(ids: Any) -> str:
    return " ".join(str(token) for token in ids)


def test_a_server_is_asked_for_a_stream_and_its_parts_are_tokens(url: str) -> None:
    Server.parts = ["one", "", " two", " three"]
    run = asyncio.run(OpenAIContender(url, model_at(url, None), decode).generate([7, 8], 3))
    assert len(run.times) == 3, "a part without text is none"
    assert run.times == sorted(run.times)
    (wish,) = Server.asked
    assert (wish["model"], wish["prompt"], wish["max_tokens"]) == ("some-model", "7 8", 3)
    assert wish["stream"] is True


def test_a_server_that_says_nothing_or_is_not_there_is_named(url: str) -> None:
    Server.parts = []
    with pytest.raises(SwarmError, match="too few"):
        asyncio.run(OpenAIContender(url, "m", decode).generate([7], 3))
    with pytest.raises(SwarmError, match="does not answer"):
        model_at("http://127.0.0.1:9/v1", None)
    with pytest.raises(BadRequest):
        model_at("file:///etc/passwd", "m")


def test_the_picture_has_a_bar_for_each_figure() -> None:
    figures = [
        Figure("speed", "a < b & c", 10.0, "tokens/s"),
        Figure("speed", "d", 5.0, "tokens/s"),
        Figure("e", "f", 0, ""),
    ]
    root = ElementTree.fromstring(svg(figures))
    background, *rectangles = root.iter("{http://www.w3.org/2000/svg}rect")
    assert background.attrib["width"] == "100%"
    bars = [float(bar.attrib["width"]) for bar in rectangles]
    assert len(bars) == 3
    assert bars[0] == pytest.approx(2 * bars[1], rel=0.01)
    assert bars[2] == 0
    assert svg([])
