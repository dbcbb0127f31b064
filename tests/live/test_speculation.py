"""With drafts going round the ring, every token is still the one that ``transformers`` gives."""

from __future__ import annotations

import pytest

from swarm.bench.drafts import TASKS
from swarm.client import AsyncClient, Generation, connect_async
from swarm.local import LocalSwarm
from tests.live.helpers import SETTINGS, Reference, watch

pytestmark = [pytest.mark.live, pytest.mark.timeout(120, func_only=True)]

TOKENS = 40
GREEDY = {"temperature": 0.0, "seed": 0}
SAMPLED = {"temperature": 0.7, "top_p": 0.9, "seed": 11}


def prompt_of(client: AsyncClient) -> list[int]:
    """What the model quotes word for word."""
    (quotation,) = (task.wish for task in TASKS if task.name == "quotation")
    return client.chat_prompt([{"role": "user", "content": quotation}])


def guessed(generation: Generation) -> int:
    """Tokens that came with the one before them, from one pass."""
    return sum(not token.hops for token in generation.trace.tokens)


async def test_greedy_with_drafts_equals_transformers(thirds: LocalSwarm, reference: Reference) -> None:
    async with connect_async(thirds.initial_peers, settings=SETTINGS) as client:
        prompt = prompt_of(client)
        seen = await watch(client, prompt, max_tokens=TOKENS, **GREEDY)
        assert seen.token_ids == reference.greedy(prompt, TOKENS)
        assert seen.result is not None
        assert guessed(seen.result) > TOKENS // 4
        plain = await watch(client, prompt, max_tokens=TOKENS, speculation="off", **GREEDY)
        assert plain.token_ids == seen.token_ids
        assert plain.result is not None
        assert guessed(plain.result) == 0


async def test_sampling_with_drafts_gives_the_tokens_of_sampling_without(thirds: LocalSwarm) -> None:
    async with connect_async(thirds.initial_peers, settings=SETTINGS) as client:
        prompt = prompt_of(client)
        plain = await watch(client, prompt, max_tokens=TOKENS, speculation="off", **SAMPLED)
        seen = await watch(client, prompt, max_tokens=TOKENS, **SAMPLED)
        assert seen.token_ids == plain.token_ids
