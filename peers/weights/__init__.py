"""Weights of a layer range, tensor by tensor, from whatever kind of checkpoint holds them.

A source opens only what its range needs and materialises only what is asked for: reading a tensor costs its size
in the wanted dtype plus one chunk of ``CHUNK_BYTES``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from peers.weights.blocks import Blocks
from peers.weights.compact import CompactRows
from peers.weights.gguf import GgufSource
from peers.weights.hub import fetch_range
from peers.weights.safetensors_folder import SafetensorsSource
from swarm.architectures import Architecture
from swarm.errors import WrongRange
from swarm.models import ModelReference, config_dict
from swarm.types import LayerRange

__all__ = ["Blocks", "CompactRows", "TensorSource", "open_source"]


class TensorSource(Protocol):
    """Parameters under their Hugging Face names, for example ``model.layers.3.self_attn.q_proj.weight``."""

    def names(self) -> list[str]:
        """The tensors of the range: its layers, the embedding for layer 0, norm and head for the last layer."""

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
        """A new tensor that nothing else refers to."""

    def rows(self, name: str, indices: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """``[len(indices), columns]`` on the CPU, straight from the file: an embedding lookup without the table."""

    def compact(self, name: str, start: int, stop: int) -> CompactRows | None:
        """Rows ``start`` to ``stop`` of a matrix as they are stored, or None if that isn't smaller than float32."""

    def blocks(self, name: str) -> Blocks | None:
        """A matrix in the blocks that the checkpoint has it in, or None if it has it otherwise."""

    def close(self) -> None: ...


def open_source(reference: ModelReference, layers: LayerRange) -> TensorSource:
    """Raises :class:`ModelError` if a tensor of the range is missing, misshapen or cut off."""
    architecture = Architecture.from_config(config_dict(reference), reference.name)
    if layers.end > architecture.num_layers:
        raise WrongRange(f"{reference.name} has the layers 0:{architecture.num_layers}; {layers} is outside")
    wanted = architecture.shapes(layers.start, layers.end)
    if reference.kind == "gguf":
        return GgufSource(reference.path, architecture, wanted)
    if reference.kind == "hub":
        return SafetensorsSource(fetch_range(reference, list(wanted)), wanted)
    return SafetensorsSource(reference.path, wanted)
