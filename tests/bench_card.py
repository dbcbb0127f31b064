"""Measures a shard on a graphics card against ``transformers`` there: layers of a Llama's shape with random weights.

``python -m tests.bench_card [--layers N] [--hidden N] [--device cuda] [--dtype bfloat16]``; the default is a quarter of
Llama 3 8B. Medians of interleaved rounds, in milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from peers.row_codec import DTYPES
from peers.shard import Shard, Step
from swarm.types import LayerRange
from tests.reference import ModelSource, profile_of

CONTEXT, PROMPT = 64, 512
Contender = Callable[[], None]


def build(layers: int, hidden: int, dtype: torch.dtype, device: str) -> Any:
    heads = hidden // 128
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=7 * hidden // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        vocab_size=128256,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
    return model.eval()


def transformers_step(model: Any, device: str) -> Contender:
    cache = DynamicCache(config=model.config)

    @torch.inference_mode()
    def step(ids: list[int] = [7]) -> None:  # noqa: B006  (it is only read)
        logits = model(torch.tensor([ids], device=device), None, None, cache, use_cache=True).logits
        int(logits[0, -1].argmax())

    step(list(range(CONTEXT)))
    return step


def transformers_prompt(model: Any, device: str) -> Contender:
    @torch.inference_mode()
    def prompt() -> None:
        ids = torch.arange(PROMPT, device=device)[None]
        int(model(ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())

    return prompt


def steps(shard: Shard, sessions: int) -> Contender:
    caches = [shard.new_cache(shard.layers, 4096) for _ in range(sessions)]
    for cache in caches:
        shard.run([Step(shard.layers, cache, 0, token_ids=list(range(CONTEXT)))])

    def step() -> None:
        for output in shard.run([Step(shard.layers, c, c.length, token_ids=[7], head_rows=1) for c in caches]):
            assert output.logits is not None
            int(output.logits[0].argmax())

    return step


def prompt(shard: Shard) -> Contender:
    cache = shard.new_cache(shard.layers, PROMPT)
    return lambda: shard.run([Step(shard.layers, cache, 0, token_ids=list(range(PROMPT)), head_rows=1)]) and None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES))
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    dtype, device = DTYPES[options.dtype], options.device
    model = build(options.layers, options.hidden, dtype, device)
    config, everything = model.config, LayerRange(0, options.layers)
    shard = Shard.load(profile_of(config), config.to_dict(), ModelSource(model), everything, device, dtype)
    contenders = {
        "transformers, a step": transformers_step(model, device),
        "a step": steps(shard, 1),
        "a step of 16 sessions": steps(shard, 16),
        f"transformers, {PROMPT} tokens": transformers_prompt(model, device),
        f"{PROMPT} tokens": prompt(shard),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(2 + options.rounds):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            if round_number >= 2:
                times[name].append(1000 * (time.perf_counter() - started))
    for name, taken in times.items():
        print(f"{name:28} {statistics.median(taken):8.2f} ms")


if __name__ == "__main__":
    main()
