"""Matrices in blocks of 32 weights, as GGUF has them: each with a scale of its own, and 4 or 8 bits a weight."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from enum import Enum
from typing import Final

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from swarm.architectures import BLOCK

__all__ = ["BLOCK", "BlockKind", "Blocks", "to_blocks"]


class BlockKind(Enum):
    """The value is what :mod:`peers.block_kernels` calls it."""

    Q4_0 = 0
    Q4_1 = 1
    Q8_0 = 2
    BFLOAT16 = 3

    @property
    def block_bytes(self) -> int:
        return _BYTES[self]

    @property
    def bits(self) -> int:
        """Of a weight, without its share of the block's scale."""
        return _BITS[self]


_BYTES: Final = {BlockKind.Q4_0: 18, BlockKind.Q4_1: 20, BlockKind.Q8_0: 34, BlockKind.BFLOAT16: 64}
_BITS: Final = {BlockKind.Q4_0: 4, BlockKind.Q4_1: 4, BlockKind.Q8_0: 8, BlockKind.BFLOAT16: 16}


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix ``[rows, columns]``."""

    kind: BlockKind
    data: torch.Tensor
    """``[rows, bytes of a row]`` of uint8: the scales of a row's blocks, then their minima, then their codes."""

    @classmethod
    def from_gguf(cls, kind: BlockKind, data: torch.Tensor) -> Blocks:
        """``data`` is ``[rows, bytes of a row]`` block after block, as files have it. The same bytes, in another order:
        one instruction reads the scales of eight blocks that way."""
        if kind is BlockKind.BFLOAT16:
            return cls(kind, data)
        blocks = data.view(data.shape[0], -1, kind.block_bytes)
        ends = (0, 2, 4, kind.block_bytes) if kind is BlockKind.Q4_1 else (0, 2, kind.block_bytes)
        parts = [blocks[..., start:end].flatten(1) for start, end in itertools.pairwise(ends)]
        return cls(kind, torch.cat(parts, 1))

    def to(self, device: torch.device) -> Blocks:
        return Blocks(self.kind, self.data.to(device))

    @property
    def rows(self) -> int:
        return self.data.shape[0]

    @property
    def columns(self) -> int:
        return self.data.shape[1] // self.kind.block_bytes * BLOCK

    def expand(self) -> torch.Tensor:
        """``[rows, columns]`` float32."""
        if self.kind is BlockKind.BFLOAT16:
            return self.data.view(torch.bfloat16).float()
        count = self.columns // BLOCK
        halves = 2 if self.kind is BlockKind.Q4_1 else 1
        factors = self.data[:, : 2 * halves * count].contiguous().view(torch.float16).float()
        codes = self.data[:, 2 * halves * count :].reshape(self.rows, count, -1)
        scale = factors[:, :count, None]
        if self.kind is BlockKind.Q8_0:
            return (codes.view(torch.int8) * scale).flatten(1)
        shift = factors[:, count:, None] if halves == 2 else -8 * scale
        return (torch.cat((codes & 15, codes >> 4), -1) * scale + shift).flatten(1)


def to_blocks(weights: torch.Tensor, kind: BlockKind) -> Blocks:
    """``weights``: ``[rows, columns]`` float32 on the CPU. Rounds to the nearest code, as llama.cpp's tools do."""
    if kind is BlockKind.BFLOAT16:
        return Blocks(kind, weights.to(torch.bfloat16).contiguous().view(torch.uint8))
    packed: np.ndarray = quantize(weights.contiguous().numpy(), GGMLQuantizationType[kind.name])
    return Blocks.from_gguf(kind, torch.from_numpy(packed))
