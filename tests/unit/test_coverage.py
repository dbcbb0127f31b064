"""While layers are missing, everything that is asked says so in the same words."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from typing import Any, cast

import pytest

from peers.delegation import DelegationHandler
from swarm import protocol_pb2 as pb
from swarm.client import AsyncClient
from swarm.commands import status
from swarm.commands.drawing import ASCII
from swarm.config import DiscoverySettings, Settings
from swarm.discovery import SwarmView
from swarm.errors import NoRoute, Unreachable
from swarm.gateway.generations import Generations
from swarm.health import Health
from swarm.hop_planner import HopPlanner
from swarm.prefix import SessionPrefix
from swarm.sampling import SamplingParams
from swarm.testing import Directory
from swarm.transcript import GenerationRequest, Transcript
from swarm.transport import Transport
from swarm.types import Announcement, LayerRange, PeerAddress, PeerId, PeerState, SessionId
from tests.sim.world import PROFILE as SMALL

MB = 1_000_000
PROFILE = replace(SMALL, name="smollm2-135m", num_layers=30, layer_bytes=7 * MB)
MISSING = (
    "nobody serves layers 10:20: 10 of 30 layers, 70 MB of weights; "
    "a peer started with --layers 10:20, or with --layers auto, would help"
)
WHOLE = "all 30 layers are served, each by 1 or more of 3 peers"


def peer(name: str, start: int, end: int) -> Announcement:
    return Announcement(
        peer=PeerAddress(PeerId(name)),
        model=PROFILE.model_id,
        layers=LayerRange(start, end),
        state=PeerState.SERVING,
        version="0",
        decode_s_per_layer=0.001,
        prefill_s_per_token_layer=0.0001,
        kv_tokens_free=1000,
    )


FIRST, MIDDLE, LAST = peer("first", 0, 10), peer("middle", 10, 20), peer("last", 20, 30)


class Swarm(Directory):
    async def refresh(self) -> list[Announcement]:  # type: ignore[override]
        return list(self.announcements())

    def since_look(self) -> float:
        return 0.0


def swarm(*peers: Announcement, refused: str | None = None) -> Swarm:
    known = {a.peer.peer_id: a for a in peers}
    return Swarm(known, lambda a: refused if a.peer.peer_id == MIDDLE.peer.peer_id else None)


def client(view: Swarm | SwarmView) -> AsyncClient:
    made = AsyncClient([], None, Settings())
    made.view, made.profile, made.health = cast(Any, view), PROFILE, Health(60.0)
    return made


async def status_line(view: Swarm) -> str:
    seen = status.status_of(PROFILE, [(a, 1.0) for a in view.announcements()], view.check)
    assert status.as_event(seen)["coverage"] == seen.coverage.sentence()
    return next(line for line in status.rendered(seen, ASCII, 64) if "layers are served" in line or "nobody" in line)


async def library(view: Swarm) -> str:
    await client(view).plan(10)
    return WHOLE


async def planning_peer(view: Swarm) -> str:
    DelegationHandler(cast(Transport, None), view, PROFILE, Settings()).plan(pb.PlanRequest(tokens=10))
    return WHOLE


async def session(view: Swarm) -> str:
    request = GenerationRequest((1, 2, 3), 4, SamplingParams(), frozenset())
    transcript, health = Transcript(request, 7, PROFILE.vocab_size), Health(60.0)
    prefix = SessionPrefix(health.prefixes, PROFILE.model_id, transcript)
    planner = HopPlanner(SessionId("s"), transcript, prefix, view, PROFILE, Settings(), health)
    try:
        planner.plan(LayerRange(0, PROFILE.num_layers), (), ())
    except NoRoute as error:
        await planner.explain(error, {})
    return WHOLE


async def gateway(view: Swarm) -> str:
    generations = Generations(client(view), cast(Any, None), Settings().gateway)
    return (await generations.check_coverage()).sentence()


class DeadDht:
    looks = 0

    async def store(self, key: str, subkey: str, value: bytes, ttl_s: float) -> bool:
        return False

    async def get_many(self, keys: Collection[str]) -> dict[str, dict[str, tuple[bytes, float]]]:
        self.looks += 1
        await asyncio.sleep(0.01)
        raise Unreachable("the DHT can't be read")


async def test_of_many_requests_one_waits_for_a_dht_that_does_not_answer() -> None:
    dht = DeadDht()
    view = SwarmView(dht, PROFILE.model_id, PROFILE.num_layers, DiscoverySettings())
    generations = Generations(client(view), cast(Any, None), Settings().gateway)
    asked = await asyncio.gather(*(generations.check_coverage() for _ in range(8)), return_exceptions=True)
    assert [type(answer) for answer in asked] == [NoRoute] * 8
    assert dht.looks == 1
    assert math.isinf(view.age())


Asked = Callable[[Swarm], Awaitable[str]]


@pytest.mark.parametrize("ask", [status_line, library, planning_peer, session, gateway])
async def test_everybody_says_what_is_missing_in_the_same_words(ask: Asked) -> None:
    async def said(view: Swarm) -> str:
        try:
            return await ask(view)
        except NoRoute as error:
            return error.message

    assert await said(swarm(FIRST, LAST)) == MISSING
    assert await said(swarm(FIRST, MIDDLE, LAST)) == WHOLE
    untrusted = await said(swarm(FIRST, MIDDLE, LAST, refused="nobody has vouched for its layers"))
    assert untrusted.replace(", except middle [10:20]: nobody has vouched for its layers", "") == MISSING
    draining = replace(MIDDLE, state=PeerState.DRAINING)
    assert (await said(swarm(FIRST, draining, LAST))).replace(", except middle [10:20]: it is draining", "") == MISSING


def test_the_status_names_weights_that_are_not_the_usual_ones() -> None:
    for weights, told in (("auto", "30 layers, float32"), ("int4", "30 layers, float32, int4 weights")):
        seen = status.status_of(replace(PROFILE, weights=weights), [], lambda a: None)
        assert status.rendered(seen, ASCII, 64)[0] == f"{PROFILE.model_id}, {told}"
