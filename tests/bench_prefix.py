"""How soon a chat's next turn begins: time to its first token with and without what the last turn left at the peers.

``python -m tests.bench_prefix [--tokens 1500] [--rounds 3]``: three peers serve the built-in model. In each round one
client has a first turn of so many tokens and then a second one; another client, for which nothing is kept, asks the
same second turn. The tokens have to be equal.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys

from swarm import connect_async
from swarm.client import AsyncClient, Generation
from swarm.local import LocalSwarm
from tests.live.helpers import MODEL, SETTINGS, STORY, THIRDS

BAR = 0.15
TURN = {"temperature": 0, "max_tokens": 16}
QUESTION = " And what did the captain say about it when he came home?"


async def ask(client: AsyncClient, prompt: list[int]) -> Generation:
    generation = await client.generate(prompt, **TURN)
    await asyncio.sleep(0.5)  # nobody types faster
    return generation


async def rounds(swarm: LocalSwarm, tokens: int, count: int) -> list[float]:
    """For each round, warm time over cold time."""
    ratios: list[float] = []
    async with (
        connect_async(swarm.initial_peers, settings=SETTINGS) as chatting,
        connect_async(swarm.initial_peers, settings=SETTINGS) as stranger,
    ):
        await ask(chatting, chatting.tokenizer.encode("The harbour"))
        await ask(stranger, stranger.tokenizer.encode("The harbour"))
        for number in range(count):
            first = chatting.tokenizer.encode(f"Story {number}. {STORY}")[:tokens]
            begun = await ask(chatting, first)
            second = [*first, *begun.token_ids, *chatting.tokenizer.encode(QUESTION)]
            warm, cold = await ask(chatting, second), await ask(stranger, second)
            assert warm.token_ids == cold.token_ids, f"{warm.token_ids} and {cold.token_ids}"
            ratios.append(warm.timings.ttft_s / cold.timings.ttft_s)
            print(
                f"{number + 1}: first turn of {len(first)} tokens {begun.timings.ttft_s * 1e3:.0f} ms; second turn of "
                f"{len(second)}: {warm.timings.ttft_s * 1e3:.0f} ms, {cold.timings.ttft_s * 1e3:.0f} ms without what "
                f"was kept: {ratios[-1]:.1%}",
                flush=True,
            )
    return ratios


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with LocalSwarm(MODEL, THIRDS, dtype="float32") as swarm:
        ratio = statistics.median(asyncio.run(rounds(swarm, options.tokens, options.rounds)))
    print(f"median {ratio:.1%} of the cold time; the bar is {BAR:.0%}")
    return 0 if ratio < BAR else 1


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    sys.exit(main())
