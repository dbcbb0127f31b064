"""Matrices in blocks of 32 weights, as GGUF has them: each with a scale of its own, and 4 or 8 bits a weight."""

from __future__ import annotations

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
    """``[rows, bytes of a row]`` of uint8, block after block as in files: its scale, its minimum, its codes."""

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
        factors, codes = self.parts()
        scale = factors[..., :1].float()
        if self.kind is BlockKind.Q8_0:
            return (codes.view(torch.int8) * scale).flatten(1)
        shift = factors[..., 1:].float() if self.kind is BlockKind.Q4_1 else -8 * scale
        return (torch.cat((codes & 15, codes >> 4), -1) * scale + shift).flatten(1)

    def parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``[rows, blocks, ...]``: scale and minimum, if there is one, as float16; and the bytes of the codes.

        Of 4 bits, byte n holds those of columns n and n + 16.
        """
        blocks = self.data.view(self.rows, -1, self.kind.block_bytes)
        halves = 2 if self.kind is BlockKind.Q4_1 else 1
        return blocks[..., : 2 * halves].contiguous().view(torch.float16), blocks[..., 2 * halves :]


def to_blocks(weights: torch.Tensor, kind: BlockKind) -> Blocks:
    """``weights``: ``[rows, columns]`` float32 on the CPU; bfloat16 may be that already. Rounds to the nearest code,
    as llama.cpp's tools do."""
    if kind is BlockKind.BFLOAT16:
        return Blocks(kind, weights.to(torch.bfloat16).contiguous().view(torch.uint8))
    packed: np.ndarray = quantize(weights.contiguous().numpy(), GGMLQuantizationType[kind.name])
    return Blocks(kind, torch.from_numpy(packed))
