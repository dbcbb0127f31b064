"""A chat's next turn on real peers: what ``transformers`` says, from a part of the work."""

from __future__ import annotations

import pytest

from peers.drafting import MAX_DRAFT
from swarm.client import connect_async
from swarm.local import LocalSwarm
from swarm.session import Generated, Session
from tests.live.helpers import SETTINGS, STORY, Reference, descriptions, released, watch

pytestmark = [pytest.mark.live, pytest.mark.timeout(120, func_only=True)]


async def test_the_next_turn_of_a_chat_is_right_and_computes_only_what_is_new(
    thirds: LocalSwarm, reference: Reference
) -> None:
    async with connect_async(thirds.initial_peers, settings=SETTINGS) as client:
        prompt = client.tokenizer.encode(STORY)[:700]
        first = await watch(client, prompt, max_tokens=40, temperature=0)
        assert first.token_ids == reference.greedy(prompt, 40)
        await released(client, thirds)
        kept = [told.kv_bytes_kept for told in await descriptions(client, thirds)]
        assert min(kept) > 0
        following = [*prompt, *first.token_ids, *client.tokenizer.encode(" Then")]
        session = client.session(client.request(following, max_tokens=8, temperature=0))
        assert isinstance(session, Session)
        async with session:
            tokens = [event.token_id async for event in session.events() if isinstance(event, Generated)]
        assert tokens == reference.greedy(following, 8)
        # whole blocks of the 739 positions; where the answer ends in a draft, of those before the draft
        assert session.reused in (739 // 32 * 32, (739 - 1 - MAX_DRAFT) // 32 * 32)
        await released(client, thirds)
