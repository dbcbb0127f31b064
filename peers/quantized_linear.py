"""Matrix products from weights that stay in blocks of 4, 8 or 16 bits a weight, computed in float32.

Few rows wait for memory: weights are read in their blocks and expanded in registers. Many rows wait for arithmetic:
a piece of the matrix is expanded into scratch that a cache holds, and the dense kernel does the rest. Which of the
two ran shows in the last bits of float32 only, so replayed rows continue a session as the lost ones would have; rows in
bfloat16 are multiplied in that if there are many. On other devices than CPUs pieces are always expanded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import nn

from peers.block_kernels import BlockKernels, block_kernels
from peers.compiled import shared_out
from peers.linear import packing_works, product
from peers.weights.blocks import Blocks

DENSE_ROWS: Final = 32
"""From so many rows on the dense kernel is faster, with the expansion."""
SCRATCH_BYTES: Final = 4 * 2**20
"""Of an expanded piece."""


class QuantizedLinear(nn.Module):
    """Stands in for ``nn.Linear``, with rows of any float dtype."""

    def __init__(self, matrix: Blocks, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = matrix.rows, matrix.columns
        self.matrix = matrix
        self.bias = bias
        self._kernels = block_kernels() if matrix.data.device.type == "cpu" else None
        # It holds an address within the matrix, which this object keeps.
        self._product = self._kernels.bind(matrix) if self._kernels is not None else None

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        flat = rows.reshape(-1, self.in_features)
        if self._product is not None and flat.shape[0] < DENSE_ROWS:
            flat = flat.float().contiguous()
            result = flat.new_empty(flat.shape[0], self.out_features)
            multiply = self._product
            shared_out(lambda first, stop: multiply(flat, result, first, stop), self.out_features)
        else:
            result = _many(self._kernels, self.matrix, flat.contiguous())
        if rows.ndim != 2 or rows.dtype != torch.float32:
            result = result.view(*rows.shape[:-1], self.out_features).to(rows.dtype)
        return result if self.bias is None else result.add_(self.bias)


class SideBySide(nn.Module):
    """Products with matrices of several kinds, their outputs one after the other."""

    def __init__(self, parts: Sequence[QuantizedLinear]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(rows) for part in self.parts], -1)


def _many(kernels: BlockKernels | None, matrix: Blocks, rows: torch.Tensor) -> torch.Tensor:
    """In the rows' own dtype where the machine has a kernel for that: what rounds rows may round weights, too."""
    on_cpu = rows.device.type == "cpu"
    dtype = rows.dtype if not on_cpu or packing_works(rows.dtype) else torch.float32
    rows = rows.to(dtype)
    multiply = product if on_cpu and packing_works(dtype) else nn.functional.linear
    result = rows.new_empty(rows.shape[0], matrix.rows)
    step = max(1, SCRATCH_BYTES // (4 * matrix.columns))
    scratch = rows.new_empty(min(step, matrix.rows), matrix.columns, dtype=torch.float32)
    for first in range(0, matrix.rows, step):
        stop = min(first + step, matrix.rows)
        piece = scratch[: stop - first]
        if kernels is None:
            piece.copy_(Blocks(matrix.kind, matrix.data[first:stop]).expand())
        else:
            kernels.expand(matrix, first, stop, piece)
        result[:, first:stop] = multiply(rows, piece.to(dtype))
    return result
