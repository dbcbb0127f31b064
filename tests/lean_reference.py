"""Small random models of every family, made without importing more of transformers than a peer does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from peers.weights import Blocks, CompactRows
from swarm.models import ModelProfile
from swarm.types import ModelId

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


class RandomSource:
    """A TensorSource of seeded numbers for the parameters of a bare model."""

    def __init__(self, model: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tensors = {
            name: torch.randn(parameter.shape, generator=generator) * 0.1
            for name, parameter in model.named_parameters()
        }

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
        return self.tensors[name].to(device, dtype)

    def rows(self, name: str, indices: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self.tensors[name][list(indices)].to("cpu", dtype)

    def compact(self, name: str, start: int, stop: int) -> CompactRows | None:
        return None

    def blocks(self, name: str) -> Blocks | None:
        return None

    def close(self) -> None:
        pass


def profile(family: str) -> ModelProfile:
    return ModelProfile(
        model_id=ModelId(f"{family}@0"),
        name=family,
        architecture=family,
        num_layers=SIZES["num_hidden_layers"],
        hidden_size=SIZES["hidden_size"],
        vocab_size=SIZES["vocab_size"],
        num_kv_heads=SIZES["num_key_value_heads"],
        head_dim=SIZES["head_dim"],
        max_positions=SIZES["max_position_embeddings"],
        dtype="float32",
        end_ids=(),
        layer_bytes=0,
        embedding_bytes=0,
        head_bytes=0,
    )
