"""A gateway's state without a network: a swarm that is only told of, and generations that go as they are written.

``python -m tests.console_world PORT [KEY]`` serves the console over it, for a look at the pages.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI

from swarm.config import Settings
from swarm.errors import NoRoute
from swarm.gateway import console
from swarm.gateway.hub import Began, Ended, GenerationHub
from swarm.gateway.local_peers import LocalPeers
from swarm.gateway.state import Access, GatewayState
from swarm.models import ModelProfile
from swarm.session import RouteChanged
from swarm.types import (
    Announcement,
    Hop,
    HopTiming,
    LayerRange,
    ModelId,
    PeerAddress,
    PeerId,
    PeerState,
    Route,
    Token,
)

MODEL = ModelId("smollm2-135m@0123456789abcdef")
PROFILE = ModelProfile(
    model_id=MODEL,
    name="smollm2-135m",
    architecture="llama",
    num_layers=30,
    hidden_size=576,
    vocab_size=49152,
    num_kv_heads=3,
    head_dim=64,
    max_positions=8192,
    dtype="float32",
    end_ids=(2,),
    layer_bytes=14_000_000,
    embedding_bytes=113_000_000,
    head_bytes=113_000_000,
    tied=True,
)
TEXT = (
    "The sky looks blue because air scatters the short waves of sunlight far more than the long ones. "
    "Whichever way we look, some of that scattered blue light reaches us, while the red goes on in a straight line. "
)


def peer_id(letter: str) -> PeerId:
    return PeerId("12D3KooW" + letter * 44)


def announcement(letter: str, start: int, end: int, **other: Any) -> Announcement:
    peer = PeerAddress(peer_id(letter), (f"/ip4/127.0.0.1/tcp/40000/p2p/{peer_id(letter)}",))
    values: dict[str, Any] = {
        "peer": peer,
        "model": MODEL,
        "layers": LayerRange(start, end),
        "state": PeerState.SERVING,
        "version": "0.1.0",
        "decode_s_per_layer": 0.0026,
        "prefill_s_per_token_layer": 0.0001,
        "kv_tokens_free": 41_000,
        "memory_mb": 2100,
    }
    return Announcement(**(values | other))


@dataclass
class ToldView:
    peers: list[Announcement]
    age_s: float = 3.0

    def check(self, announcement: Announcement) -> None:
        """Anybody is used."""

    def announcements(self) -> list[Announcement]:
        return self.peers

    def age(self, peer: PeerId | None = None) -> float:
        return self.age_s

    def since_look(self) -> float:
        return self.age_s

    async def refresh(self) -> list[Announcement]:
        return self.peers


class ToldTokenizer:
    has_chat_template = True


@dataclass(frozen=True)
class Asked:
    prompt: tuple[int, ...]
    max_tokens: int


@dataclass
class ToldClient:
    view: ToldView
    profile: ModelProfile = PROFILE
    tokenizer: ToldTokenizer = field(default_factory=ToldTokenizer)
    asked: list[Any] = field(default_factory=list)

    def chat_prompt(self, messages: Sequence[Any]) -> list[int]:
        self.asked.append(list(messages))
        return [1, 2, 3]

    def request(self, prompt: Any, **options: Any) -> Asked:
        self.asked.append((prompt, options))
        return Asked((1, 2, 3), options["max_tokens"] or 50)


@dataclass
class ToldGenerations:
    """``pieces`` as tokens, ``token_s`` each; the hop in the middle changes before token ``lost_at``."""

    hub: GenerationHub
    pieces: Sequence[str] = tuple(f"{word} " for word in TEXT.split())
    token_s: float = 0.0
    lost_at: int | None = None
    refuses: bool = False
    running: int = 0

    @asynccontextmanager
    async def reserve(self, count: int) -> AsyncIterator[ToldGenerations]:
        if self.refuses:
            raise NoRoute("nobody serves layers 10:20")
        self.running += 1
        try:
            yield self
        finally:
            self.running -= 1

    async def stream(
        self, request: Asked, stop: Sequence[str] = (), *, source: str, generation: str = ""
    ) -> AsyncGenerator[RouteChanged | Token, None]:
        route = _route("ABC")
        self.hub.publish(Began(generation, "console", 3, request.max_tokens, time.time()))
        yield RouteChanged(1, route, "opened")
        for index in range(request.max_tokens):
            await asyncio.sleep(self.token_s)
            if index == self.lost_at:
                await asyncio.sleep(10 * self.token_s)
                route = _route("ADC")
                yield RouteChanged(2, route, "lost BBBBBB [10:20]: the stream to BBBBBB ended without its end frame")
            wave = 1 + 0.2 * ((index * 7919) % 10) / 10
            hops = tuple(
                HopTiming(hop.peer.peer_id, hop.layers, 0.002 * wave, 0.018 * wave, 1, 0.0011) for hop in route.hops
            )
            guessed = index > 0 and index % 9 == 0
            yield Token(index, 100 + index, self.pieces[index % len(self.pieces)], () if guessed else hops)
        self.hub.publish(Ended(generation, "length", request.max_tokens, self.lost_at is not None, 0.1, 12.5))


def _route(letters: str) -> Route:
    ranges = (LayerRange(0, 10), LayerRange(10, 20), LayerRange(20, 30))
    hops = (Hop(PeerAddress(peer_id(letter)), layers) for letter, layers in zip(letters, ranges, strict=True))
    return Route(tuple(hops))


def told_state(
    peers: Sequence[Announcement] | None = None,
    access: Access | None = None,
    local_peers: LocalPeers | None = None,
) -> GatewayState:
    thirds = [announcement("A", 0, 10), announcement("B", 10, 20), announcement("C", 20, 30)]
    hub = GenerationHub(64)
    client = ToldClient(ToldView(list(thirds if peers is None else peers)))
    return GatewayState(
        client=client,  # type: ignore[arg-type]
        settings=Settings(),
        access=access or Access(),
        initial_peers=("/ip4/127.0.0.1/tcp/40000/p2p/" + peer_id("A"),),
        hub=hub,
        generations=ToldGenerations(hub),  # type: ignore[arg-type]
        local_peers=local_peers or LocalPeers(),
    )


def told_app(state: GatewayState) -> FastAPI:
    app = FastAPI()
    app.include_router(console.router(state))
    return app


async def _serve(port: int, api_key: str = "") -> None:
    from swarm.gateway.serve import Server, listen

    peers = [
        announcement("A", 0, 10, sessions=1),
        announcement("B", 10, 20, sessions=2, queue_s=0.004, state=PeerState.DRAINING),
        announcement("D", 10, 20),
        announcement("C", 20, 28, decode_s_per_layer=0.0009, gpu=True, memory_mb=11900),
        announcement("E", 0, 6, state=PeerState.JOINING, moving_to=LayerRange(6, 14)),
    ]
    async with LocalPeers() as local:
        state = told_state(peers, Access(api_key=api_key), local)
        state.generations.token_s = 0.06  # type: ignore[attr-defined]
        state.generations.lost_at = 60  # type: ignore[attr-defined]
        with listen("127.0.0.1", port) as sock, contextlib.suppress(KeyboardInterrupt):
            server = Server(
                told_app(state), state.settings.gateway, lambda: print("ready", flush=True), state.hub.close
            )
            await server.serve(sockets=[sock])


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), *sys.argv[2:]))
