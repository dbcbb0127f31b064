"""Measures whole-model shards against ``transformers`` on the built-in model, one thread: decode steps and prefill.

Contenders run in turn, and ratios are taken within a round: absolute speed depends on what else the machine does. Times
are processor time of the one thread that works.
``python -m tests.bench_shard [--rounds N] [--tokens N] [--sessions 1,16] [--weights auto,int4] [--profile]``
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from peers.shard import Shard, Step
from peers.weights import open_source
from swarm.models import config_dict, load_profile, resolve
from swarm.types import LayerRange
from tests.reference import built_in_model

PROMPT = list(range(1000, 1008))
LONG_PROMPT = list(range(1000, 1512))


def load(weights: str) -> Shard:
    reference = resolve("smollm2-135m", weights=weights)
    profile = load_profile(reference)
    layers = LayerRange(0, profile.num_layers)
    return Shard.load(profile, config_dict(reference), open_source(reference, layers), layers)


def decode(shard: Shard, sessions: int, tokens: int) -> list[list[int]]:
    """Greedy tokens of ``sessions`` equal sessions, all in one batch."""
    caches = [shard.new_cache(shard.layers, len(PROMPT) + tokens) for _ in range(sessions)]
    rows: list[list[int]] = [list(PROMPT) for _ in caches]
    out: list[list[int]] = [[] for _ in caches]
    for _ in range(tokens):
        steps = [
            Step(shard.layers, cache, cache.length, token_ids=ids, head_rows=1)
            for cache, ids in zip(caches, rows, strict=True)
        ]
        for index, output in enumerate(shard.run(steps)):
            assert output.logits is not None
            rows[index] = [int(output.logits[-1].argmax())]
            out[index] += rows[index]
    return out


def prefill(shard: Shard) -> None:
    cache = shard.new_cache(shard.layers, len(LONG_PROMPT))
    shard.run([Step(shard.layers, cache, 0, token_ids=LONG_PROMPT, head_rows=1)])


def generate(model: Any, tokens: int) -> list[list[int]]:
    ids = torch.tensor([PROMPT])
    ends = {"eos_token_id": None, "pad_token_id": 0}
    done = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, **ends)
    return [done[0, len(PROMPT) :].tolist()]


def print_profile(shard: Shard, tokens: int) -> None:
    """Where the time of decode steps goes, by torch's operators."""
    with torch.profiler.profile() as profile:
        decode(shard, 1, tokens)
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=40))


def print_rates(times: dict[str, list[float]], units: dict[str, int], base: str, unit: str) -> None:
    for name, seen in times.items():
        ratio = statistics.median(
            units[name] / own / (units[base] / other) for own, other in zip(seen, times[base], strict=True)
        )
        print(f"{name:22} {units[name] / min(seen):8.1f} {unit}  {ratio:5.2f} x {base}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--sessions", default="1,16")
    parser.add_argument("--weights", default="auto,bfloat16,int8,int4")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    tokens: int = options.tokens
    torch.set_num_threads(1)
    model = built_in_model()
    shards = {weights: load(weights) for weights in options.weights.split(",")}
    if options.profile:
        for weights, shard in shards.items():
            print(weights)
            print_profile(shard, tokens)

    decoding: dict[str, Callable[[], list[list[int]]]] = {"generate": lambda: generate(model, tokens)}
    units = {"generate": tokens}
    prefilling: dict[str, Callable[[], object]] = {"prefill transformers": lambda: model(torch.tensor([LONG_PROMPT]))}
    for weights, shard in shards.items():
        prefilling[f"prefill {weights}"] = lambda shard=shard: prefill(shard)
        for sessions in map(int, options.sessions.split(",")):
            name = f"{weights} x{sessions}"
            decoding[name] = lambda shard=shard, sessions=sessions: decode(shard, sessions, tokens)
            units[name] = sessions * tokens
    with torch.inference_mode():
        for work, unit in ((decoding, "tokens/s"), (prefilling, "tokens/s")):
            times: dict[str, list[float]] = {name: [] for name in work}
            expected = generate(model, tokens)[0]
            for turn in range(options.rounds + 1):
                for name, contender in work.items():
                    began = time.thread_time()
                    out = contender()
                    if turn:  # the first warms up
                        times[name].append(time.thread_time() - began)
                    if name.startswith("auto"):
                        assert all(ids == expected for ids in out), f"{name}: other tokens than generate"  # type: ignore[attr-defined]
            print_rates(times, units | dict.fromkeys(prefilling, len(LONG_PROMPT)), next(iter(work)), unit)


if __name__ == "__main__":
    main()
