"""How a peer's memory is divided, and how many layers fit it. Pure arithmetic in bytes.

What a peer gives (``max_memory_mb``, or what is free) less a margin holds: the weights of its layers, the table of
the embedding with layer 0 (on a CPU it stays in the file) and that of the head with the last layer (a tied one once),
buffers of the largest batch, and KV caches with their checkpoint logs, which take all that is left. Room for
``kv_tokens`` tokens comes before another layer: a layer without KV room serves nobody. (prima.cpp and exo divide by
weights alone and run out at run time.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from swarm.architectures import DTYPE_BYTES
from swarm.coverage import weights_bytes
from swarm.models import ModelProfile
from swarm.types import Capacity, LayerRange

MB = 1_000_000
WORKING_ROWS = 24
"""Activations that a layer has alive at once, in rows of hidden size: residual, norm, q, k, v, and the MLP's."""


@dataclass(frozen=True, slots=True)
class Demands:
    """What a peer wants beside its weights."""

    kv_tokens: int
    """Least room in KV caches, over all its layers."""
    margin: float
    """Share of the memory that is left alone."""
    batch_tokens: int
    """Rows of the largest batch."""
    logits_rows: int = 64
    """Rows of logits at once, in float32."""
    checkpoints: bool = True
    embedding_in_file: bool = False
    """As on a CPU: rows of the embedding are read from the checkpoint, unless the table is the head as well."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Where the bytes of a peer with ``layers`` go."""

    layers: LayerRange
    given_bytes: int
    margin_bytes: int
    weights_bytes: int
    """Embedding and head included."""
    buffers_bytes: int
    kv_bytes: int
    """For KV caches and checkpoint logs together: what is left; negative if the layers don't fit."""
    token_bytes: int
    """KV of one token in all layers, and its row of the checkpoint log."""
    kv_tokens_wanted: int

    @property
    def fits(self) -> bool:
        return self.kv_tokens >= self.kv_tokens_wanted

    @property
    def kv_tokens(self) -> int:
        return max(0, self.kv_bytes // self.token_bytes)

    def with_most_kv(self, most_bytes: int) -> MemoryPlan:
        """What is left of the memory is not taken."""
        if self.kv_bytes <= most_bytes:
            return self
        taken = self.weights_bytes + self.buffers_bytes + most_bytes
        return replace(self, given_bytes=taken, margin_bytes=0, kv_bytes=most_bytes)

    def in_mb(self) -> dict[str, float | int]:
        """For the ``ready`` event."""
        parts = {
            "given": self.given_bytes,
            "margin": self.margin_bytes,
            "weights": self.weights_bytes,
            "buffers": self.buffers_bytes,
            "kv": self.kv_bytes,
        }
        return {f"{name}_mb": round(size / MB, 1) for name, size in parts.items()} | {"kv_tokens": self.kv_tokens}

    def sentence(self) -> str:
        return (
            f"layers {self.layers} in {self.given_bytes / MB:.0f} MB: at most {self.weights_bytes / MB:.0f} weights, "
            f"{self.kv_bytes / MB:.0f} KV caches and logs ({self.kv_tokens} tokens), {self.buffers_bytes / MB:.0f} "
            "buffers" + (f", {self.margin_bytes / MB:.0f} left alone" if self.margin_bytes else "")
        )


def plan_memory(given_bytes: int, profile: ModelProfile, layers: LayerRange, demands: Demands) -> MemoryPlan:
    """How ``given_bytes`` are divided if the peer takes ``layers``; ask :attr:`MemoryPlan.fits`."""
    item = DTYPE_BYTES[profile.dtype]
    last = layers.end == profile.num_layers
    margin = int(given_bytes * demands.margin)
    weights = weights_bytes(profile, layers)
    if demands.embedding_in_file and layers.start == 0 and not (last and profile.tied):
        weights -= profile.embedding_bytes
    buffers = demands.batch_tokens * profile.hidden_size * item * WORKING_ROWS
    if last:
        buffers += demands.logits_rows * profile.vocab_size * 4
    log = profile.hidden_size * item if demands.checkpoints and not last else 0
    return MemoryPlan(
        layers=layers,
        given_bytes=given_bytes,
        margin_bytes=margin,
        weights_bytes=weights,
        buffers_bytes=buffers,
        kv_bytes=given_bytes - margin - weights - buffers,
        token_bytes=len(layers) * kv_bytes_per_layer(profile) + log,
        kv_tokens_wanted=demands.kv_tokens,
    )


def kv_bytes_per_layer(profile: ModelProfile) -> int:
    """Of one token."""
    return 2 * profile.num_kv_heads * profile.head_dim * DTYPE_BYTES[profile.dtype]


def capacity_layers(
    given_bytes: int, profile: ModelProfile, demands: Demands, *, has_first: bool = False, has_last: bool = False
) -> int:
    """The most layers that fit, in the middle of the model, at one of its ends, or (both) in all of it."""

    def fits(count: int) -> bool:
        start = 0 if has_first else profile.num_layers - count if has_last else 1
        layers = LayerRange(start, start + count)
        return plan_memory(given_bytes, profile, layers, demands).fits

    if has_first and has_last:
        return profile.num_layers if fits(profile.num_layers) else 0
    most = profile.num_layers - (1 if has_first or has_last else 2)
    low, high = 0, max(0, most)
    while low < high:  # more layers never fit better
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def capacity_of(given_bytes: int, profile: ModelProfile, demands: Demands) -> Capacity:
    return Capacity(
        middle=capacity_layers(given_bytes, profile, demands),
        first=capacity_layers(given_bytes, profile, demands, has_first=True),
        last=capacity_layers(given_bytes, profile, demands, has_last=True),
        whole=capacity_layers(given_bytes, profile, demands, has_first=True, has_last=True) > 0,
    )


def least_bytes(profile: ModelProfile, layers: LayerRange, demands: Demands) -> int:
    """What a peer must give to serve ``layers``: for the refusal that says what would fit."""
    plan = plan_memory(0, profile, layers, demands)
    needed = plan.weights_bytes + plan.buffers_bytes + demands.kv_tokens * plan.token_bytes
    return int(needed / (1 - demands.margin)) + 1
