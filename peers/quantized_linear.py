"""Matrix products from weights that stay in blocks of 4, 8 or 16 bits a weight, computed in float32.

On a CPU with a compiler they lie in panels, as the kernels of :mod:`peers.block_kernels` read them; an NVIDIA card has
kernels of its own. Elsewhere one piece of the matrix after the other is expanded for torch's own product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Final

import torch
from torch import nn

from peers.attention_kernel import LANES
from peers.block_kernels import PANEL, BlockKernels, Panels, block_kernels
from peers.card_linear import CardLinear, card_works
from peers.compiled import shared_out
from peers.linear import bfloat16_is_fast, blank, blank_size, memory_of, product
from peers.weights.blocks import BlockKind, Blocks

MANY_ROWS: Final = 32
"""From so many rows on the machine's own kernel for bfloat16 is faster, with the expansion."""
SCRATCH_BYTES: Final = 4 * 2**20
"""Of an expanded piece."""


def quantized_linear(matrix: Blocks, bias: torch.Tensor | None) -> PanelLinear | CardLinear | BlockLinear:
    """Stands in for ``nn.Linear``, with rows of any float dtype."""
    kernels = block_kernels() if matrix.data.device.type == "cpu" else None
    if kernels is not None:
        return PanelLinear(kernels, Panels.of(matrix), bias)
    return CardLinear(matrix, bias) if card_works(matrix.data.device) else BlockLinear(matrix, bias)


class PanelLinear(nn.Module):
    """A row of float32 gets the same bits in any company. Many rows in bfloat16 are multiplied in that, where the
    machine can: what rounds rows may round weights, too. Not for two threads at once: they would share a scratch
    matrix."""

    def __init__(self, kernels: BlockKernels, matrix: Panels, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix.outputs, matrix.inputs
        self.matrix = matrix
        self.bias = bias
        self._kernels = kernels

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        flat = rows.reshape(-1, self.in_features)
        result = self._in_bfloat16(flat) if flat.shape[0] >= MANY_ROWS and rows.dtype == torch.bfloat16 else None
        if result is None:
            result = self._in_float32(flat.float().contiguous())
        if rows.ndim != 2 or rows.dtype != result.dtype:
            result = result.view(*rows.shape[:-1], self.out_features).to(rows.dtype)
        return result if self.bias is None else result.add_(self.bias)

    def _in_float32(self, rows: torch.Tensor) -> torch.Tensor:
        result = rows.new_empty(rows.shape[0], self.out_features)
        multiply, matrix = self._kernels.product, self.matrix
        shared_out(lambda first, stop: multiply(rows, matrix, first, stop, result), len(matrix.data))
        return result

    def _in_bfloat16(self, rows: torch.Tensor) -> torch.Tensor | None:
        """None where the kernel or its layout is not known."""
        if self.matrix.kind is BlockKind.BFLOAT16:
            return None
        count, size = len(self.matrix.data), 2 * PANEL * self.in_features
        step = -(-count // -(-count * size // SCRATCH_BYTES))
        parts = []
        for first in range(0, count, step):
            pieces = min(step, count - first)
            scratch = _scratch(pieces, self.in_features)
            if scratch is None:
                return None
            shared_out(partial(self._round, scratch, first), pieces)
            parts.append(product(rows, scratch.matrix))
        result = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return result[:, : self.out_features]

    def _round(self, scratch: _Scratch, offset: int, first: int, stop: int) -> None:
        address = scratch.address + first * 2 * PANEL * self.in_features
        self._kernels.round_panels(self.matrix, offset + first, offset + stop, scratch.packed, address)


@dataclass(frozen=True, slots=True)
class _Scratch:
    matrix: torch.Tensor
    """Of bfloat16, packed by oneDNN."""
    packed: int
    address: int


@lru_cache(maxsize=16)
def _scratch(panels: int, inputs: int) -> _Scratch | None:
    """None where the machine has no fast kernel, or packs for it in another way than ``round_panels``."""
    shape = panels * PANEL, inputs, torch.bfloat16
    packed = blank_size(*shape) if bfloat16_is_fast() else None
    if packed is None or PANEL % packed or packed % LANES:
        return None
    matrix = blank(*shape)
    return _Scratch(matrix, packed, memory_of(matrix).data_ptr())


class BlockLinear(nn.Module):
    """For devices without kernels, and for machines without a compiler, where it is slow."""

    def __init__(self, matrix: Blocks, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix.rows, matrix.columns
        self.matrix = matrix
        self.bias = bias

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        result = rows.new_empty(*rows.shape[:-1], self.out_features)
        step = max(1, SCRATCH_BYTES // (4 * self.in_features))
        for first in range(0, self.out_features, step):
            piece = Blocks(self.matrix.kind, self.matrix.data[first : first + step]).expand().to(rows.dtype)
            result[..., first : first + step] = nn.functional.linear(rows, piece)
        return result if self.bias is None else result.add_(self.bias)


class SideBySide(nn.Module):
    """Products with matrices of several kinds, their outputs one after the other."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(rows) for part in self.parts], -1)
