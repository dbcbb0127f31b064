"""The sections of ``swarm bench``: each takes contenders and gives figures.

Contenders run in turn, round by round, and ratios are taken within a round: a machine that others use too is slow for
all of them at the same time.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from swarm.bench.processes import cpu_s, peak_mb, peak_of_imports_mb
from swarm.bench.reference import Reference
from swarm.bench.runs import Run, hop_shares, percentile, ratio, throughput
from swarm.client import AsyncClient, AsyncStream
from swarm.local import LocalSwarm
from swarm.sample_text import sample_prompt
from swarm.types import Token

TRANSFORMERS, ONE, THREE, GIVEN, SERVER = "transformers generate", "one peer", "three peers", "swarm", "server"
"""Names of contenders, in this order everywhere."""
RATIOS = (
    *((ONE, TRANSFORMERS), (THREE, ONE), (THREE, TRANSFORMERS)),
    *((ONE, SERVER), (THREE, SERVER), (GIVEN, SERVER)),
)
"""Whose figures are divided by whose, where both take part."""


@dataclass(frozen=True, slots=True)
class Figure:
    section: str
    name: str
    value: float
    unit: str


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is done."""

    rounds: int
    tokens: int
    prompt: int
    prefill: int = 512
    """Tokens of the prompt that section ``prefill`` times ..."""
    mixed: int = 1000
    """... and of the one that is computed beside a session in section ``mixed``."""
    sessions: tuple[int, ...] = (1, 2, 4, 8, 16)


class Contender(Protocol):
    @property
    def pids(self) -> list[int]: ...

    async def generate(self, prompt: Sequence[int], max_tokens: int) -> Run: ...


class ReferenceContender:
    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self.pids = [reference.pid]

    async def generate(self, prompt: Sequence[int], max_tokens: int) -> Run:
        return await asyncio.to_thread(self._reference.generate, prompt, max_tokens)


class SwarmContender:
    """Greedy if nothing else is asked for."""

    def __init__(self, client: AsyncClient, pids: Sequence[int] = ()) -> None:
        """``pids``: the peers' processes, where they are ours."""
        self.client = client
        self.pids = list(pids)

    async def generate(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        kv_cache: bool = True,
        speculation: str = "off",
        wire: str | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        to_the_end: bool = False,
        watched: Callable[[int], bool] | None = None,
    ) -> Run:
        """Past the end of the text unless ``to_the_end``, so that every run has the same number of tokens. Without
        speculation unless asked for: texts that go on past their end repeat themselves.

        ``watched`` hears how many tokens there are, after each; the run ends when it answers with False."""
        request = self.client.request(
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            kv_cache=kv_cache,
            speculation=speculation,
            wire=wire,
        )
        ends = request.end_ids if to_the_end else frozenset()
        stream = AsyncStream(self.client, dataclasses.replace(request, end_ids=ends), ())
        run = Run([], [], [])
        began = time.perf_counter()
        async with contextlib.aclosing(aiter(stream)) as events:
            async for event in events:
                if isinstance(event, Token):
                    run.times.append(time.perf_counter() - began)
                    run.token_ids.append(event.token_id)
                    run.hops.append(event.hops)
                    if watched is not None and not watched(len(run.times)):
                        break
        return run


Report = Callable[[str], None]


async def speed(
    contenders: Mapping[str, Contender], prompt: Sequence[int], scale: Scale, report: Report, link_s: float = 0.0
) -> list[Figure]:
    """Tokens a second, time to first token, time between tokens; and where it goes. ``link_s``: of every link."""
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    cpu_ms: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        await contender.generate(prompt, 4)  # the first run is a warm-up
    for number in range(scale.rounds):
        for name in turned(list(contenders), number):
            before_s = cpu_s(contenders[name].pids)
            run = await contenders[name].generate(prompt, scale.tokens)
            cpu_ms[name].append(1e3 * (cpu_s(contenders[name].pids) - before_s) / scale.tokens)
            runs[name].append(run)
            report(f"speed, round {number + 1} of {scale.rounds}: {name} {run.tokens_per_second:.1f} tokens/s")
    figures = []
    rates = {name: [run.tokens_per_second for run in done] for name, done in runs.items()}
    for name, done in runs.items():
        gaps = [gap for run in done for gap in run.gaps]
        figures += [
            Figure("speed", name, statistics.median(rates[name]), "tokens/s"),
            Figure("speed", f"{name}: first token", 1e3 * statistics.median(run.ttft_s for run in done), "ms"),
            Figure("speed", f"{name}: between tokens, p50", 1e3 * percentile(gaps, 0.5), "ms"),
            Figure("speed", f"{name}: between tokens, p95", 1e3 * percentile(gaps, 0.95), "ms"),
            Figure("speed", f"{name}: between tokens, p99", 1e3 * percentile(gaps, 0.99), "ms"),
        ]
        if contenders[name].pids:  # hardly moved by what else the machine does; the prompt is shared out
            figures.append(Figure("speed", f"{name}: processor time a token", statistics.median(cpu_ms[name]), "ms"))
    for above, below in RATIOS:
        if above in rates and below in rates:
            figures.append(Figure("speed", f"{above} / {below}", ratio(rates[above], rates[below]), "x"))
            best = max(rates[above]) / max(rates[below])
            figures.append(Figure("speed", f"{above} / {below}, best rounds", best, "x"))
    told = [done for done in runs.values() if all(run.token_ids for run in done)]  # a server tells no token ids
    texts = {tuple(run.token_ids) for done in told for run in done}
    if len(told) > 1:
        figures.append(Figure("speed", "different texts among all runs", float(len(texts)), ""))
    for name in (THREE, GIVEN):
        if name in runs:
            figures += _hops(name, runs[name], link_s)
    return figures


def turned(names: list[str], by: int) -> list[str]:
    """Another one begins each round."""
    start = by % len(names)
    return names[start:] + names[:start]


def _hops(name: str, runs: Sequence[Run], link_s: float) -> list[Figure]:
    shares, rest_s = hop_shares(runs)
    figures = []
    for share in shares:
        figures.append(Figure("hops", f"{name}: layers {share.layers}, queue", 1e3 * share.queue_s, "ms"))
        figures.append(Figure("hops", f"{name}: layers {share.layers}, compute", 1e3 * share.compute_s, "ms"))
    if shares:
        figures.append(Figure("hops", f"{name}: wire, a hop", 1e3 * rest_s / len(shares), "ms"))
    if shares and link_s:
        ideal_s = sum(share.compute_s for share in shares) + len(shares) * link_s
        measured_s = statistics.median(gap for run in runs for gap in run.gaps)
        figures.append(Figure("hops", f"{name}: between tokens / (compute + links)", measured_s / ideal_s, "x"))
    return figures


async def sessions(contender: SwarmContender, scale: Scale, report: Report) -> list[Figure]:
    """One session against many at once on the same peers."""
    rates: dict[int, list[float]] = {count: [] for count in scale.sessions}
    gaps: dict[int, list[float]] = {count: [] for count in scale.sessions}
    firsts: dict[int, list[float]] = {count: [] for count in scale.sessions}
    for number in range(scale.rounds):
        for count in scale.sessions:
            prompts = [sample_prompt(contender.client.tokenizer, scale.prompt, 7 * i) for i in range(count)]
            runs = await asyncio.gather(*(contender.generate(prompt, scale.tokens) for prompt in prompts))
            rates[count].append(throughput(runs))
            gaps[count] += [gap for run in runs for gap in run.gaps]
            firsts[count] += [run.ttft_s for run in runs]
            report(f"sessions, round {number + 1} of {scale.rounds}: {count} at once {rates[count][-1]:.1f} tokens/s")
    figures = [Figure("sessions", f"{n} at once", statistics.median(rate), "tokens/s") for n, rate in rates.items()]
    for n, all_gaps in gaps.items():
        figures.append(Figure("sessions", f"{n} at once: first token", 1e3 * statistics.median(firsts[n]), "ms"))
        for share in (0.5, 0.95, 0.99):
            value = 1e3 * percentile(all_gaps, share)
            figures.append(Figure("sessions", f"{n} at once: between tokens, p{100 * share:.0f}", value, "ms"))
    first, *more = scale.sessions
    return figures + [Figure("sessions", f"{n} / {first}", ratio(rates[n], rates[first]), "x") for n in more]


async def kv_cache(contender: SwarmContender, prompt: Sequence[int], scale: Scale, report: Report) -> list[Figure]:
    """What the KV cache is worth: the same request with and without it."""
    rates: dict[bool, list[float]] = {True: [], False: []}
    for number in range(scale.rounds):
        for cached in rates:
            run = await contender.generate(prompt, max(4, scale.tokens // 3), kv_cache=cached)
            rates[cached].append(run.tokens_per_second)
            name = "with" if cached else "without"
            report(f"KV cache, round {number + 1} of {scale.rounds}: {name} {run.tokens_per_second:.1f} tokens/s")
    return [
        Figure("kv-cache", f"with, {len(prompt)} tokens of context", statistics.median(rates[True]), "tokens/s"),
        Figure("kv-cache", "without", statistics.median(rates[False]), "tokens/s"),
        Figure("kv-cache", "with / without", ratio(rates[True], rates[False]), "x"),
    ]


async def memory(swarms: Mapping[str, LocalSwarm], reference: Reference | None) -> list[Figure]:
    """Peak resident memory of each process so far, and of a peer's imports alone."""
    imports = await asyncio.to_thread(peak_of_imports_mb)
    figures = [Figure("memory", "a peer's imports alone", imports, "MiB")]
    if reference is not None:
        figures.append(Figure("memory", TRANSFORMERS, peak_mb(reference.pid), "MiB"))
    peaks: dict[str, list[float]] = {}
    for name, swarm in swarms.items():
        peaks[name] = [peak_mb(peer.pid) for peer in swarm.peers]
        for peer, peak in zip(swarm.peers, peaks[name], strict=True):
            figures.append(Figure("memory", f"{name}: layers {peer.layers}", peak, "MiB"))
    if ONE in peaks and THREE in peaks:
        figures += thirds(peaks[ONE][0], peaks[THREE])
    return figures


def thirds(whole: float, parts: Sequence[float]) -> list[Figure]:
    """What a part takes of the memory of all layers; a model of one or two layers has fewer than three."""
    figures = [Figure("memory", "largest third / whole", max(parts) / whole, "x")]
    if len(parts) == 3:
        figures.append(Figure("memory", "middle third / whole", parts[1] / whole, "x"))
    return figures
