"""Sections of ``swarm bench`` about long prompts: how soon their answer begins, and what others have to wait."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from swarm.bench.runs import Run, percentile, ratio
from swarm.bench.sections import RATIOS, Contender, Figure, Scale, SwarmContender, turned
from swarm.sample_text import sample_prompt
from swarm.wire import MODEL, WIRES

HEAD_START = 8
"""Tokens of the disturbed session before the other one begins."""
HEAD_START_S = 60.0
LONG_ENOUGH = 400
"""Tokens that outlast the other one's prompt."""


async def prefill(
    contenders: Mapping[str, Contender],
    prompt_of: Callable[[int], Sequence[int]],
    scale: Scale,
    report: Callable[[str], None],
) -> list[Figure]:
    """Time to the first token of a long prompt, contenders in turn. ``prompt_of``: another one for each number."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        await contender.generate(prompt_of(0), 2)  # the first run is a warm-up
    for number in range(scale.rounds):
        prompt = prompt_of(number + 1)  # a server may still have what the last round computed
        for name in turned(list(contenders), number):
            run = await contenders[name].generate(prompt, 2)
            times[name].append(run.ttft_s)
            report(f"prefill, round {number + 1} of {scale.rounds}: {name} {run.ttft_s:.2f} s")
    figures = [
        Figure("prefill", f"{name}: {len(prompt)} tokens to the first one", 1e3 * statistics.median(taken), "ms")
        for name, taken in times.items()
    ]
    for above, below in RATIOS:
        if above in times and below in times:
            figures.append(Figure("prefill", f"{above} / {below}, time", ratio(times[above], times[below]), "x"))
    return figures


async def wires(contender: SwarmContender, scale: Scale, report: Callable[[str], None]) -> list[Figure]:
    """Time to the first token of a long prompt, and between tokens, for each way in which hidden states may travel."""
    runs: dict[str, list[Run]] = {wire: [] for wire in WIRES}
    tokenizer = contender.client.tokenizer
    await contender.generate(sample_prompt(tokenizer, scale.prompt), 2)  # the first run is a warm-up
    for number in range(scale.rounds):
        prompt = sample_prompt(tokenizer, scale.prefill, 3 * number)
        for wire in turned(list(WIRES), number):
            run = await contender.generate(prompt, scale.tokens, wire=wire)
            runs[wire].append(run)
            report(f"wire, round {number + 1} of {scale.rounds}: {wire} {run.ttft_s:.2f} s to the first token")
    figures = []
    for wire, done in runs.items():
        firsts, gaps = [run.ttft_s for run in done], [gap for run in done for gap in run.gaps]
        name = f"{wire}: {scale.prefill} tokens to the first one"
        figures.append(Figure("wire", name, 1e3 * statistics.median(firsts), "ms"))
        figures.append(Figure("wire", f"{wire}: between tokens, p50", 1e3 * percentile(gaps, 0.5), "ms"))
        if wire != MODEL:
            exact = [run.ttft_s for run in runs[MODEL]]
            figures.append(Figure("wire", f"{wire} / {MODEL}, time to the first one", ratio(firsts, exact), "x"))
    return figures


async def mixed(contender: SwarmContender, scale: Scale, report: Callable[[str], None]) -> list[Figure]:
    """Time between the tokens of one session, alone and while the prompt of another one is computed."""
    client = contender.client
    tokenizer = client.tokenizer
    # What a session may have, a small model's context or the peers' limit, has to do for all of the disturbed one.
    limit = min(client.profile.max_positions, client.settings.peer.max_cache_tokens_per_session)
    most, other = min(LONG_ENOUGH, limit // 2), min(scale.mixed, limit - 2)
    alone: list[float] = []
    disturbed: list[float] = []
    took: list[float] = []
    for number in range(scale.rounds):
        prompt = sample_prompt(tokenizer, min(scale.prompt, limit - most), 3 * number)
        alone += (await contender.generate(prompt, scale.tokens)).gaps
        long_prompt = sample_prompt(tokenizer, other, 5 + number)
        gaps, prefill_s = await _disturbed(contender, prompt, most, long_prompt)
        disturbed += gaps
        took.append(prefill_s)
        report(f"mixed, round {number + 1} of {scale.rounds}: {len(gaps)} tokens during a prompt of {prefill_s:.1f} s")
    figures = [Figure("mixed", f"first token of {other} tokens beside it", 1e3 * statistics.median(took), "ms")]
    for share in (0.5, 0.95) if disturbed else ():  # a prompt may be computed between two tokens
        calm, busy = percentile(alone, share), percentile(disturbed, share)
        figures += [
            Figure("mixed", f"between tokens alone, p{100 * share:.0f}", 1e3 * calm, "ms"),
            Figure("mixed", f"between tokens during that prompt, p{100 * share:.0f}", 1e3 * busy, "ms"),
            Figure("mixed", f"during / alone, p{100 * share:.0f}", busy / calm, "x"),
        ]
    return figures


async def _disturbed(
    contender: SwarmContender, prompt: Sequence[int], most: int, other: Sequence[int]
) -> tuple[list[float], float]:
    """Gaps of one session that end while ``other`` is computed, and how long that took. Seconds."""
    begun, done = asyncio.Event(), asyncio.Event()
    at: list[float] = []

    def watched(tokens: int) -> bool:
        at.append(time.perf_counter())
        if tokens >= HEAD_START:
            begun.set()
        return not done.is_set()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(contender.generate(prompt, most, watched=watched))
        async with asyncio.timeout(HEAD_START_S):
            await begun.wait()
        began = time.perf_counter()
        run = await contender.generate(other, 2)
        done.set()
    ended = began + run.ttft_s
    return [later - earlier for earlier, later in itertools.pairwise(at) if began < later <= ended], run.ttft_s
