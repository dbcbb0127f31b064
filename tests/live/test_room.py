"""Sessions that grow together on real peers with too little memory for all of them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from swarm.client import connect_async
from swarm.types import LayerRange
from tests.live.helpers import MODEL, SETTINGS, STORY, Reference, local_swarm, released, watch

pytestmark = [pytest.mark.live, pytest.mark.timeout(180, func_only=True)]


async def test_sessions_that_have_to_give_way_come_to_the_same_tokens(tmp_path: Path, reference: Reference) -> None:
    little = {"SWARM_PEER_KV_BUDGET_MB": "13"}  # eight blocks a peer; each session comes to take five
    with local_swarm(MODEL, (LayerRange(0, 15), LayerRange(15, 30)), tmp_path, env=little) as swarm:
        async with connect_async(swarm.initial_peers, settings=SETTINGS) as client:
            text = client.tokenizer.encode(STORY)
            prompts = [text[start : start + length] for start, length in ((0, 50), (300, 40), (600, 30))]
            told = await asyncio.gather(*(watch(client, prompt, max_tokens=250, temperature=0) for prompt in prompts))
            for prompt, generation in zip(prompts, told, strict=True):
                assert len(generation.token_ids) == 250
                assert reference.agrees(prompt, generation.token_ids)
            reasons = [route.reason for generation in told for route in generation.routes[1:]]
            # A neighbour may be the first to say that a stage which gave way is gone.
            assert any("KV budget" in reason or "no such stage" in reason for reason in reasons), reasons
            await released(client, swarm)
