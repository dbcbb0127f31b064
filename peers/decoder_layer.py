"""A decoder layer with nothing but arithmetic: for the families whose layers have the shape of Llama's.

Llama, Mistral, Qwen2 and Qwen3 differ in biases, windows and norms of heads only. This is their modeling code's
arithmetic in fewer steps: one product for queries, keys and values, one for gate and up, one rotation for queries and
keys. A step of one row costs as much in calls as in small operations, and a shard makes dozens of each per layer.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn
from torch.nn.functional import silu

from peers.attention import Attending
from peers.norm import fast_norm

FAMILIES: Final = ("llama", "mistral", "qwen2", "qwen3")
"""``model_type`` of the transformers config."""


class DecoderLayer(nn.Module):
    """Stands in for the family's decoder layer, whose norms and numbers it takes over."""

    def __init__(
        self, layer: Any, query_key_value: nn.Module, output: nn.Module, gate_up: nn.Module, down: nn.Module
    ) -> None:
        super().__init__()
        attention = layer.self_attn
        self.layer_idx: int = attention.layer_idx
        self.head_dim: int = attention.head_dim
        self.scaling: float = attention.scaling
        self.window = _window(attention)
        self.heads: int = attention.config.num_attention_heads
        self.kv_heads: int = attention.config.num_key_value_heads
        self.input_norm = fast_norm(layer.input_layernorm)
        self.output_norm = fast_norm(layer.post_attention_layernorm)
        self.query_norm: nn.Module | None = getattr(attention, "q_norm", None)
        self.key_norm: nn.Module | None = getattr(attention, "k_norm", None)
        self.query_key_value, self.output = query_key_value, output
        self.gate_up, self.down = gate_up, down

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        spans: Attending,
        **_: Any,
    ) -> torch.Tensor:
        """``[1, rows, hidden]`` -> the same; ``position_embeddings`` are those of :class:`Rotation`."""
        hidden = hidden_states[0].contiguous()
        rotated = self.heads + self.kv_heads
        mixed: torch.Tensor = self.query_key_value(self.input_norm(hidden)).view(hidden.shape[0], -1, self.head_dim)
        turned = rotate(self._normed(mixed[:, :rotated]), *position_embeddings)
        hidden = hidden + self.output(self._attend(turned, mixed, spans))
        gate, up = self.gate_up(self.output_norm(hidden)).tensor_split(2, -1)
        result: torch.Tensor = hidden + self.down(silu(gate).mul_(up))
        return result[None]

    def _normed(self, heads: torch.Tensor) -> torch.Tensor:
        if self.query_norm is None or self.key_norm is None:
            return heads
        return torch.cat((self.query_norm(heads[:, : self.heads]), self.key_norm(heads[:, self.heads :])), 1)

    def _attend(self, turned: torch.Tensor, mixed: torch.Tensor, spans: Attending) -> torch.Tensor:
        """``[rows, heads * head_dim]`` for queries and keys ``turned``, and the values at the end of ``mixed``."""
        turned, values = turned.transpose(0, 1), mixed[:, self.heads + self.kv_heads :].transpose(0, 1)
        queries, keys = turned[: self.heads], turned[self.heads :]
        found = spans.attend(self.layer_idx, self.window, self.scaling, queries, keys, values)
        return found.reshape(mixed.shape[0], -1).contiguous()


def _window(attention: Any) -> int | None:
    """Qwen's layers have a window each, or none; Mistral's all have the config's; Llama's code knows none."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window  # type: ignore[no-any-return]
    return attention.config.sliding_window if attention.config.model_type == "mistral" else None


class Rotation(nn.Module):
    """The family's rotary tables, once a step in the form that :func:`rotate` takes."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, *inputs: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines, and sines with the sign of their half, both ``[rows, 1, head_dim]``."""
        cos, sin = self.rotary(*inputs, **named)
        half = sin.shape[-1] // 2
        signed = torch.cat((-sin[0, :, None, :half], sin[0, :, None, half:]), -1)
        return cos[0, :, None], signed


def rotate(heads: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """``[rows, heads, head_dim]``: each half rotated into the other."""
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), signed_sin)
