"""What a GGUF file says of its model in transformers' words: the config, and the token ids that mean something."""

from __future__ import annotations

import math
import struct
from typing import Any

from swarm.architectures import SUPPORTED, check_supported
from swarm.errors import ModelError, UnsupportedModel
from swarm.gguf_file import GgufHeader

_F32 = 0
# Llama 3.1 and later scale their rotary frequencies by this recipe; a GGUF file holds only its result
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_ORIGINAL = 1.0, 4.0, 8192

_USUAL_SCALING = {
    "attn_factor": 1.0,
    "yarn_ext_factor": 1.0,
    "yarn_attn_factor": 1.0,
    "yarn_log_multiplier": 0.0,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
}
"""What llama.cpp takes where a file is silent, and transformers too."""


def gguf_config(header: GgufHeader) -> dict[str, Any]:
    """The transformers config; raises :class:`UnsupportedModel`, or :class:`ModelError` for missing metadata."""
    family, path = header.architecture, header.path
    check_supported(family, str(path))
    if _optional(header, "expert_count"):
        raise UnsupportedModel(f"{path} is a mixture of experts; only dense models of {', '.join(SUPPORTED)} can run")
    if "token_embd.weight" not in header.tensors:
        raise ModelError(f"{path} lacks the tensor token_embd.weight")
    heads, hidden = _whole(header, "attention.head_count"), _whole(header, "embedding_length")
    head_dim = _optional(header, "attention.key_length") or hidden // heads
    rotary = _optional(header, "rope.dimension_count")
    if rotary and rotary != head_dim:
        raise UnsupportedModel(f"{path} rotates {rotary} of {head_dim} dimensions; only whole heads can run")
    config: dict[str, Any] = {
        "model_type": family,
        "hidden_size": hidden,
        "intermediate_size": _whole(header, "feed_forward_length"),
        "num_hidden_layers": _whole(header, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _optional(header, "attention.head_count_kv") or heads,
        "head_dim": head_dim,
        "max_position_embeddings": _whole(header, "context_length"),
        "rms_norm_eps": _number(header, "attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "rope_parameters": _rope(header, head_dim),
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        # llama.cpp writes the output projection only where it is not the embedding
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": header.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": end_ids(header) or None,
        "pad_token_id": header.metadata.get("tokenizer.ggml.padding_token_id"),
    }
    if family == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
        if "blk.0.ffn_gate.bias" in header.tensors:
            config["mlp_bias"] = True
    if family == "qwen3" and "blk.0.attn_q.bias" in header.tensors:
        config["attention_bias"] = True
    if family == "mistral":
        # absent means no window here, where transformers' default would be one of 4096
        config["sliding_window"] = _optional(header, "attention.sliding_window")
    return config


def end_ids(header: GgufHeader) -> list[int]:
    """End of sequence first; then end of turn where the file has one, without which a chat would run on."""
    found = (header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    return list(dict.fromkeys(token for token in found if isinstance(token, int)))


def _rope(header: GgufHeader, head_dim: int) -> dict[str, Any]:
    theta = _number(header, "rope.freq_base", 10000.0)
    for name, usual in _USUAL_SCALING.items():
        if not math.isclose(_number(header, f"rope.scaling.{name}", usual), usual):
            raise UnsupportedModel(f"{header.path} has its own rope.scaling.{name}; only the usual {usual:g} can run")
    # files of 2023 have another name for the factor, and no kind: llama.cpp takes both as linear
    factor = _number(header, "rope.scaling.factor", _number(header, "rope.scale_linear", 1.0))
    unnamed = "none" if factor in (0, 1) else "linear"
    kind = header.metadata.get(f"{header.architecture}.rope.scaling.type", unnamed)
    if "rope_freqs.weight" in header.tensors:
        return {"rope_type": "llama3", "rope_theta": theta} | _llama3_scaling(header, theta, head_dim)
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if kind == "yarn":
        original = _whole(header, "rope.scaling.original_context_length")
        return {
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": factor,
            "original_max_position_embeddings": original,
        }
    raise UnsupportedModel(f"{header.path} scales its rotary positions by {kind!r}; linear, yarn and llama3 can run")


def _llama3_scaling(header: GgufHeader, theta: float, head_dim: int) -> dict[str, Any]:
    """Recovers the recipe from its result, and checks that it is that one."""
    tensor = header.tensors["rope_freqs.weight"]
    size = 4 * tensor.elements
    with header.path.open("rb") as file:
        file.seek(tensor.offset)
        raw = file.read(size)
    if tensor.ggml_type != _F32 or tensor.shape != (head_dim // 2,) or len(raw) != size:
        raise ModelError(f"{header.path} has a rope_freqs.weight that does not fit heads of {head_dim}")
    found = struct.unpack(f"<{head_dim // 2}f", raw)
    factor = max(found)
    for index, value in enumerate(found):
        turns = _LLAMA3_ORIGINAL * theta ** (-2 * index / head_dim) / (2 * math.pi)
        smooth = min(max((turns - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW), 0.0), 1.0)
        if not math.isclose(value, 1 / ((1 - smooth) / factor + smooth), rel_tol=1e-3):
            raise UnsupportedModel(f"{header.path} scales its rotary positions in a way that is not Llama 3's")
    return {
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": _LLAMA3_ORIGINAL,
    }


def _optional(header: GgufHeader, key: str) -> int | None:
    name = f"{header.architecture}.{key}"
    value = header.metadata.get(name)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise UnsupportedModel(
        f"{header.path} has {name} = {str(value)[:40]}; only one whole number for all layers can run"
    )


def _whole(header: GgufHeader, key: str) -> int:
    value = _optional(header, key)
    if value is None or value <= 0:
        raise ModelError(f"{header.path} lacks the metadata {header.architecture}.{key}")
    return value


def _number(header: GgufHeader, key: str, default: float | None = None) -> float:
    value = header.metadata.get(f"{header.architecture}.{key}", default)
    if not isinstance(value, int | float):
        raise ModelError(f"{header.path} lacks the metadata {header.architecture}.{key}")
    return float(value)
