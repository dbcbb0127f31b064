"""The decoder architectures that a shard can run: what a config must say, which tensors follow, how large they are.

Everything that reads a checkpoint takes the list of tensors from here, so that a missing or misshapen one is
found, and named, before anything is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from swarm.errors import ModelError, UnsupportedModel

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

WEIGHTS = ("auto", "float32", "bfloat16", "int8", "int4")
"""How matrices may be stored and multiplied; ``auto``: in the dtype of the model."""
BLOCK = 32
"""Neighbouring weights of a row that share a scale, with ``int8`` and ``int4``. Other rows stay in the dtype."""
_LAYER_BYTES = {"bfloat16": 2.0, "int8": 34 / BLOCK, "int4": 20 / BLOCK}
_HEAD_BYTES = _LAYER_BYTES | {"int4": 34 / BLOCK}  # the head keeps 8 bits

_MOST, _MOST_LAYERS = 2**31 - 1, 10_000
"""A damaged header may say anything, and each layer has a list of tensors."""

# what transformers takes where a config.json is silent
_DEFAULT_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
_DEFAULT_HEAD_DIM = {"qwen3": 128}
_DEFAULT_POSITIONS = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}


@dataclass(frozen=True, slots=True)
class Architecture:
    """The numbers of a config that decide the shapes of the weights."""

    family: str
    """``model_type`` of the transformers config."""
    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    tied: bool
    """The head is the embedding; the checkpoint has no ``lm_head.weight``, or one that is the same."""
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool

    @classmethod
    def from_config(cls, config: dict[str, Any], source: str) -> Architecture:
        """``source`` names the model in errors: :class:`UnsupportedModel`, or :class:`ModelError` for a bad config."""
        family = config.get("model_type")
        if not isinstance(family, str):
            raise ModelError(f"the config of {source} lacks model_type")
        if family == "mistral" and "layer_types" in config:
            family = "ministral"  # as transformers takes it: windows in some layers only
        check_supported(family, source)
        if config.get("quantization_config"):
            raise UnsupportedModel(f"{source} is quantised ({_method(config)}); use a float checkpoint or a GGUF file")

        def number(key: str, default: int | None = None, most: int = _MOST) -> int:
            value = config.get(key)
            value = default if value is None else value
            if value is None:
                raise ModelError(f"the config of {source} lacks {key}")
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
                raise ModelError(
                    f"the config of {source} has {key} = {value!r}; it must be a positive whole number, {most} at most"
                )
            return value

        heads, hidden = number("num_attention_heads"), number("hidden_size")
        kv_heads = number("num_key_value_heads", _DEFAULT_KV_HEADS.get(family, heads))
        if heads % kv_heads:
            raise ModelError(
                f"the config of {source} has {heads} attention heads, which {kv_heads} kv heads can't share"
            )
        if config.get("sliding_window") is not None and (family == "mistral" or config.get("use_sliding_window")):
            number("sliding_window")  # transformers fails at the first token with another
        bias = bool(config.get("attention_bias", False))
        return cls(
            family=family,
            num_layers=number("num_hidden_layers", most=_MOST_LAYERS),
            hidden_size=hidden,
            intermediate_size=number("intermediate_size"),
            vocab_size=number("vocab_size"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=number("head_dim", _DEFAULT_HEAD_DIM.get(family, hidden // heads)),
            max_positions=number("max_position_embeddings", _DEFAULT_POSITIONS[family]),
            tied=bool(config.get("tie_word_embeddings", False)),
            attention_bias=family == "qwen2" or (family in {"llama", "qwen3"} and bias),
            output_bias=family in {"llama", "qwen3"} and bias,
            mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
        )

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensors of one decoder layer, named without the prefix ``model.layers.N.``."""
        hidden, wide = self.hidden_size, self.intermediate_size
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (queries, hidden),
            "self_attn.k_proj.weight": (keys, hidden),
            "self_attn.v_proj.weight": (keys, hidden),
            "self_attn.o_proj.weight": (hidden, queries),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (wide, hidden),
            "mlp.up_proj.weight": (wide, hidden),
            "mlp.down_proj.weight": (hidden, wide),
        }
        if self.attention_bias:
            shapes |= {
                "self_attn.q_proj.bias": (queries,),
                "self_attn.k_proj.bias": (keys,),
                "self_attn.v_proj.bias": (keys,),
            }
        if self.output_bias:
            shapes["self_attn.o_proj.bias"] = (hidden,)
        if self.mlp_bias:
            shapes |= {"mlp.gate_proj.bias": (wide,), "mlp.up_proj.bias": (wide,), "mlp.down_proj.bias": (hidden,)}
        if self.family == "qwen3":
            shapes |= {"self_attn.q_norm.weight": (self.head_dim,), "self_attn.k_norm.weight": (self.head_dim,)}
        return shapes

    def shapes(self, start: int, end: int) -> dict[str, tuple[int, ...]]:
        """Every tensor that a peer with layers ``start:end`` needs, by its full Hugging Face name."""
        table = (self.vocab_size, self.hidden_size)
        shapes: dict[str, tuple[int, ...]] = {}
        if start == 0:
            shapes[EMBEDDING] = table
        for layer in range(start, end):
            for name, shape in self.layer_shapes().items():
                shapes[f"model.layers.{layer}.{name}"] = shape
        if end == self.num_layers:
            shapes[FINAL_NORM] = (self.hidden_size,)
            shapes[EMBEDDING if self.tied else HEAD] = table
        return shapes

    def layer_bytes(self, dtype: str, weights: str = "auto") -> int:
        """At most: a checkpoint's own blocks are kept where they are smaller than what was chosen."""
        return sum(_matrix_bytes(shape, dtype, _LAYER_BYTES.get(weights)) for shape in self.layer_shapes().values())

    def embedding_bytes(self, dtype: str, weights: str = "auto") -> int:
        return _matrix_bytes((self.vocab_size, self.hidden_size), dtype, _HEAD_BYTES.get(weights))

    def head_bytes(self, dtype: str, weights: str = "auto") -> int:
        """Final norm and head. A peer with both ends of a tied model holds the table once."""
        return self.embedding_bytes(dtype, weights) + self.hidden_size * DTYPE_BYTES[dtype]


def check_supported(family: str, source: str) -> None:
    """Raises :class:`UnsupportedModel`."""
    if family not in SUPPORTED:
        raise UnsupportedModel(f"{source} is of the architecture {family!r}; supported are {', '.join(SUPPORTED)}")


def bytes_per_weight(dtype: str, weights: str) -> float:
    """Of a layer's matrices."""
    return _LAYER_BYTES.get(weights, DTYPE_BYTES[dtype])


def _matrix_bytes(shape: tuple[int, ...], dtype: str, each: float | None) -> int:
    if each is None or len(shape) == 1 or shape[-1] % BLOCK:
        each = DTYPE_BYTES[dtype]
    return round(prod(shape) * each)


def _method(config: dict[str, Any]) -> str:
    quantization = config["quantization_config"]
    return str(quantization.get("quant_method", "unknown method")) if isinstance(quantization, dict) else "unknown"
