"""Small random checkpoints, as safetensors folders and GGUF files, each with a tokenizer that can spell anything.

``python -m tests.checkpoints tinyllama OUT`` writes one of the shape of TinyLlama 1.1B, for measurements at size.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from swarm.architectures import DTYPE_BYTES, Architecture
from swarm.checkpoint_files import CONFIG, INDEX, SINGLE

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
_SPECIALS = ("<|end|>", "<|begin|>", "<|user|>", "<|assistant|>")
_MERGES = (
    "h e",
    "l l",
    "Ġ t",
    "he ll",
    "o r",
    "Ġ w",
    "Ġt he",
    "hell o",
    "Ġw or",
    "l d",
    "Ġwor ld",
    "i n",
    "e r",
    "a n",
)
_CHAT = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_config(family: str, *, tied: bool, layers: int, hidden: int, vocab: int, dtype: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": [f"{_CLASSES[family]}ForCausalLM"],
        "model_type": family,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden // 4,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "torch_dtype": dtype,
    }
    if family == "mistral":
        config["sliding_window"] = None
    return config


def make_checkpoint(
    folder: Path,
    family: str = "llama",
    *,
    tied: bool = False,
    layers: int = 4,
    hidden: int = 64,
    vocab: int = 384,
    dtype: str = "float32",
    shard_bytes: int = 1 << 30,
    seed: int = 0,
) -> Path:
    """A safetensors folder with random weights; sharded with an index where they exceed ``shard_bytes``."""
    return write_checkpoint(
        folder,
        make_config(family, tied=tied, layers=layers, hidden=hidden, vocab=vocab, dtype=dtype),
        shard_bytes=shard_bytes,
        seed=seed,
    )


def write_checkpoint(folder: Path, config: dict[str, Any], *, shard_bytes: int = 1 << 30, seed: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2))
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    write_tokenizer(folder, config["vocab_size"])
    architecture = Architecture.from_config(config, str(folder))
    shapes = architecture.shapes(0, architecture.num_layers)
    dtype = getattr(torch, config["torch_dtype"])
    groups = list(_groups(shapes, shard_bytes, DTYPE_BYTES[config["torch_dtype"]]))
    by_tensor: dict[str, str] = {}
    for number, names in enumerate(groups, 1):
        name = SINGLE if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        # one shard at a time: a model larger than memory can be written
        save_file(dict(random_tensors(names, shapes, dtype, seed)), folder / name, {"format": "pt"})
        by_tensor |= dict.fromkeys(names, name)
    if len(groups) > 1:
        total = sum(prod(shape) for shape in shapes.values()) * dtype.itemsize
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": by_tensor}))
    return folder


def random_tensors(
    names: Iterable[str], shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Scaled so that activations stay near one and logits are spread: greedy tokens then have clear winners."""
    order = {name: index for index, name in enumerate(shapes)}
    for name in names:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + order[name])
        shape = shapes[name]
        values = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            values.mul_(0.1).add_(1.0)
        else:
            values.mul_(shape[-1] ** -0.5)
        yield name, values.to(dtype)


def _groups(shapes: dict[str, tuple[int, ...]], shard_bytes: int, itemsize: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        needed = prod(shape) * itemsize
        if names and size + needed > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += needed
    yield names


def _tokens(vocab_size: int) -> list[str]:
    tokens = [*_SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(pair.replace(" ", "") for pair in _MERGES)]
    return tokens + [f"Ġw{index}" for index in range(vocab_size - len(tokens))]


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Byte-level BPE with a few merges; numbered words fill up the vocabulary, so that every id has a text."""
    tokens = _tokens(vocab_size)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[(left, right) for left, right in map(str.split, _MERGES)],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 1)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in _SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _SPECIALS[1],
        "eos_token": _SPECIALS[0],
        "chat_template": _CHAT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def make_gguf(
    path: Path,
    family: str = "llama",
    *,
    tied: bool = False,
    quantisation: str = "Q8_0",
    extra: dict[str, Any] | None = None,
    extra_tensors: dict[str, np.ndarray[Any, Any]] | None = None,
    layers: int = 2,
    vocab: int = 384,
    sentencepiece: bool = False,
) -> Path:
    """The same random weights as ``make_checkpoint`` would write, as llama.cpp's converter lays them out."""
    config = make_config(family, tied=tied, layers=layers, hidden=64, vocab=vocab, dtype="float32")
    writer = gguf.GGUFWriter(path, family)
    numbers = {
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "block_count": "num_hidden_layers",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "rope.dimension_count": "head_dim",
        "vocab_size": "vocab_size",
    }
    for key, name in numbers.items():
        writer.add_uint32(f"{family}.{key}", config[name])
    writer.add_float32(f"{family}.rope.freq_base", config["rope_theta"])
    writer.add_float32(f"{family}.attention.layer_norm_rms_epsilon", config["rms_norm_eps"])
    (_add_sentencepiece if sentencepiece else _add_tokenizer)(writer, vocab)
    for key, value in (extra or {}).items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        (writer.add_uint32 if isinstance(value, int) else add)(key, value)
    architecture = Architecture.from_config(config, str(path))
    shapes = architecture.shapes(0, layers)
    kind = gguf.GGMLQuantizationType[quantisation]
    for name, tensor in random_tensors(shapes, shapes, torch.float32, 0):
        values = tensor.numpy()
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if family in {"llama", "mistral"} and heads:
            values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        raw = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(_gguf_name(name), gguf.quants.quantize(values, raw), raw_dtype=raw)
    for name, values in (extra_tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("model.layers."):
        layer, _, part = stem.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{_GGUF_NAMES[part]}.{suffix}"
    return f"{_GGUF_NAMES[stem]}.{suffix}"


def _add_tokenizer(writer: gguf.GGUFWriter, vocab: int) -> None:
    tokens = _tokens(vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in _SPECIALS else 1 for token in tokens])
    writer.add_token_merges(_MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_chat_template(_CHAT)


def _add_sentencepiece(writer: gguf.GGUFWriter, vocab: int) -> None:
    """In the manner of Llama 2: bytes for what no piece spells, and pieces whose scores say what merges first."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", *"abcdefghijklmnopqrstuvwxyzHW,.", "\u2581t", "he", "\u2581the", "ll", "lo", "hell", "hello"]
    pieces += ["\u2581hello", "\u2581w", "or", "ld", "\u2581wor", "\u2581world", "in", "er", "\u2581\u2581"]
    pieces += [f"\u2581w{index}" for index in range(vocab - len(pieces))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0 if index < 259 else -float(index) for index in range(len(pieces))])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (vocab - 259)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


TINYLLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=["tinyllama", *FAMILIES])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPE_BYTES))
    arguments = parser.parse_args()
    if arguments.shape == "tinyllama":
        layers = arguments.layers or 22
        config = make_config("llama", tied=False, layers=layers, hidden=2048, vocab=32000, dtype=arguments.dtype)
        write_checkpoint(arguments.out, config | TINYLLAMA, shard_bytes=256 << 20)
    else:
        make_checkpoint(arguments.out, arguments.shape, layers=arguments.layers or 4, dtype=arguments.dtype)


if __name__ == "__main__":
    main()
