"""What each choice of weights, wire or KV cache costs: perplexity of the built-in model on a fixed text, agreement.

It is measured against float32.

``agreement`` is the share of positions whose most likely token is float32's, ``error`` the mean difference of the
logarithms of the probability that the token that follows was given. With a wire, hidden states are rounded twice, after
each third of the layers, as on a route of three peers. ``other shape`` compares a choice with itself: the share of
positions whose most likely token is another when rows come eight at a time, as a replay's do in other numbers.
``python -m tests.bench_accuracy [--weights int8,int4] [--wires int8] [--kv int8] [--model REF] [--text FILE] [--json]``
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from peers.row_codec import decoded, encoded
from peers.shard import Shard, Step
from peers.weights import open_source
from swarm import kv
from swarm.local import even_ranges
from swarm.models import TextTokenizer, config_dict, load_profile, resolve, tokenizer_files
from swarm.types import LayerRange
from swarm.wire import MODEL

TEXT = Path(__file__).with_name("accuracy_text.txt")
"""The beginning of Alice's Adventures in Wonderland (Carroll, 1865), and passages of other kinds."""
WINDOW = 256
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What a choice may be as a dtype; the others are weights of a float32 model."""


def load(model: str, dtype: str, weights: str) -> Shard:
    reference = resolve(model, dtype, weights=weights)
    profile = load_profile(reference)
    layers = LayerRange(0, profile.num_layers)
    source = open_source(reference, layers)
    return Shard.load(profile, config_dict(reference), source, layers, dtype=DTYPES[dtype])


def windows_of(model: str, text: str) -> list[list[int]]:
    """Token ids, in windows that each start from nothing."""
    ids = TextTokenizer(tokenizer_files(resolve(model))).encode(text)
    return [ids[start : start + WINDOW] for start in range(0, len(ids) - 1, WINDOW)]


def logits_of(shard: Shard, ids: list[int], wire: str, kind: str, at_once: int) -> torch.Tensor:
    """``[tokens, vocabulary]``, computed so many rows at once."""
    parts = [shard.layers] if wire == MODEL else even_ranges(shard.profile.num_layers, 3)
    caches = [shard.new_cache(layers, len(ids), kind) for layers in parts]
    logits = []
    for start in range(0, len(ids), at_once):
        tokens, hidden = ids[start : start + at_once], None
        for layers, cache in zip(parts, caches, strict=True):
            first, last = layers.start == 0, layers.end == shard.profile.num_layers
            head_rows = len(tokens) if last else 0
            (output,) = shard.run([Step(layers, cache, start, tokens if first else None, hidden, head_rows)])
            if output.hidden is not None:
                hidden = decoded(encoded(output.hidden, wire), wire, shard.profile.hidden_size, shard.dtype)
        assert output.logits is not None
        logits.append(output.logits)
    return torch.cat(logits)


def log_probabilities(
    shard: Shard, windows: list[list[int]], wire: str = MODEL, kind: str = kv.MODEL, at_once: int = WINDOW
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each position of each window but its last: that of the token that follows, and the likeliest token."""
    found, likeliest = [], []
    for ids in windows:
        logits = logits_of(shard, ids, wire, kind, at_once)[:-1]
        likeliest.append(logits.argmax(-1))
        found.append(logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
    return torch.cat(found), torch.cat(likeliest)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--weights", default="bfloat16,int8,int4")
    parser.add_argument("--wires", default="bfloat16,int8")
    parser.add_argument("--kv", default="int8")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    windows = windows_of(options.model, options.text.read_text(encoding="utf-8"))
    base, first = log_probabilities(load(options.model, "float32", "auto"), windows)
    exact = ("float32", "auto", MODEL, kv.MODEL)
    choices = {"float32": exact, "bfloat16 throughout": ("bfloat16", *exact[1:])}
    choices |= {f"weights {name}": ("float32", name, MODEL, kv.MODEL) for name in options.weights.split(",") if name}
    choices |= {f"wire {name}": ("float32", "auto", name, kv.MODEL) for name in options.wires.split(",") if name}
    choices |= {f"kv {name}": ("float32", "auto", MODEL, name) for name in options.kv.split(",") if name}
    if not options.json:
        print(f"{sum(map(len, windows))} tokens in windows of {WINDOW}\n")
        print(f"{'':20} {'perplexity':>10} {'agreement':>10} {'error':>8} {'other shape':>11} {'MB':>7}")
    for name, (dtype, weights, wire, kind) in choices.items():
        shard = load(options.model, dtype, weights)
        found, likeliest = log_probabilities(shard, windows, wire, kind)
        otherwise = log_probabilities(shard, windows, wire, kind, at_once=8)[1]
        figures = {
            "perplexity": float(torch.exp(-found.mean())),
            "agreement": float((likeliest == first).float().mean()),
            "error": float((found - base).abs().mean()),
            "other_shape": float((likeliest != otherwise).float().mean()),
            "weights_mb": shard.size_bytes / 1e6,
        }
        if options.json:
            print(json.dumps({"choice": name, **figures}), flush=True)
        else:
            perplexity, agreement, error, other, size = figures.values()
            print(f"{name:20} {perplexity:10.3f} {agreement:10.2%} {error:8.4f} {other:11.2%} {size:7.1f}", flush=True)


if __name__ == "__main__":
    main()
