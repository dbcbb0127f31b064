"""Far too many of anything in a message are refused before they are looked at."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from peers.control import ControlHandler
from swarm import protocol_pb2 as pb
from swarm.delegation import request_from_wire, route_from_wire
from swarm.errors import BadRequest, SwarmError
from swarm.sampling import SamplingParams
from swarm.testing import run_virtual
from swarm.transcript import GenerationRequest, Transcript
from swarm.types import LayerRange, PeerId
from tests.sim.world import PROFILE, SimPeer, World

MANY = 200_000
"""Of fifteen million, for which a frame has room, a peer heard nothing else for five seconds."""
STAGE = cast(Any, SimpleNamespace(first=True, max_positions=8))


def look_at(peer: SimPeer, message: object) -> None:
    handler = ControlHandler(peer.service.table, peer.service._router, lambda: peer.service.state)
    match message:
        case pb.Open():
            handler._checked(message)
        case pb.Input():
            handler._input(cast(Any, SimpleNamespace(stage=STAGE)), message)
        case pb.Frame():
            peer.service._router._to_work(STAGE, PeerId("neighbour"), message)
        case pb.Delegate():
            request_from_wire(message, PROFILE)
        case pb.PlanRequest():
            peer.service._delegation.plan(message)
        case pb.Sampling():
            SamplingParams.from_wire(message)


LONG, MODEL = [1] * MANY, PROFILE.model_id


@pytest.mark.parametrize(
    "message",
    [
        pb.Open(session="s", model=MODEL, end=6, max_positions=8, token_ids=LONG),
        pb.Input(token_ids=LONG),
        pb.Frame(token_ids=LONG),
        pb.Delegate(model=MODEL, prompt=LONG, max_tokens=1),
        pb.Delegate(model=MODEL, prompt=[1], max_tokens=1, cuts=LONG),
        pb.PlanRequest(exclude=["peer"] * MANY),
        pb.Sampling(logit_bias=dict.fromkeys(range(MANY), 1.0)),
    ],
    ids=lambda message: type(message).__name__,
)
def test_far_too_many_are_refused_before_they_are_looked_at(message: object) -> None:
    async def main() -> int:
        world = World(1)
        peer = await world.add_peer(LayerRange(0, 6))
        tracemalloc.start()
        try:
            with pytest.raises(SwarmError, match=r"limit is|takes 1 to 8|the 8 positions"):
                look_at(peer, message)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert run_virtual(main) < MANY, "else they were copied"


def test_a_route_of_far_too_many_hops_is_none() -> None:
    news = pb.RouteNews(hops=[pb.RouteHop(peer=pb.Address(peer_id="p"), start=n, end=n + 1) for n in range(1000)])
    with pytest.raises(BadRequest, match="limit is"):
        route_from_wire(news)


def test_nobody_looks_at_what_a_hop_says_after_the_end_of_a_text() -> None:
    transcript = Transcript(GenerationRequest((1,), 1, SamplingParams(), frozenset()), 2, 64)
    transcript.commit(pb.Output(token_ids=[3]))
    assert transcript.finish_reason == "length"

    def millions() -> Iterator[int]:
        yield 3
        yield 4
        raise AssertionError("somebody looks at all of them")

    transcript.commit(cast(pb.Output, SimpleNamespace(start=0, hops=[], logprobs=[], token_ids=millions())))
    assert transcript.tokens == [1, 3]


@pytest.mark.parametrize("length", [0, 129])
def test_who_may_send_to_a_stage_is_named_by_a_peer_id(length: int) -> None:
    """A stage keeps these names for as long as it lives, and a frame has room for megabytes of them."""

    async def main() -> None:
        world = World(1)
        peer = await world.add_peer(LayerRange(0, 6))
        opening = pb.Open(session="s", model=MODEL, end=6, max_positions=8, token_ids=[1], previous=["x" * length])
        with pytest.raises(SwarmError, match="a peer id has"):
            look_at(peer, opening)
        await world.settle()

    run_virtual(main)
