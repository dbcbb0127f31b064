"""A large matrix that stays as small as the checkpoint stores it, and is multiplied as if it were float32.

Products with few rows wait for memory, so reading a byte per weight and expanding blocks of it within the cache is
faster than reading four bytes. A block is expanded into a scratch matrix in the very layout that oneDNN's kernel
reads (see :mod:`peers.linear`), by a kernel whose every output depends on its own row of weights alone: results are
equal to those of the whole matrix in float32, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Final

import torch
from torch import nn

from peers.linear import OneDnnLinear, blank, blank_size, memory_of, product
from peers.weights.compact import CompactRows

ReadRows = Callable[[int, int], CompactRows | None]
"""Rows ``start`` to ``stop`` of a matrix, or None if the checkpoint has no exact compact form of it."""

SCRATCH_BYTES: Final = 4 * 2**20
"""Of an expanded block: small enough for a cache, large enough that the calls for each cost nothing."""
_STEP: Final = 192
"""Rows of a scratch matrix are a multiple of this: of all of ``PACKED_SIZES``."""


class CompactLinear(nn.Module):
    """Stands in for an ``nn.Linear`` without bias, in float32 on a CPU. Not for two threads at once: they would
    share the scratch matrix."""

    def __init__(self, out_features: int, in_features: int, scratch_rows: int, block: int) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.size_bytes = 0
        self._block = block
        self._rows = scratch_rows
        self._scratch = blank(scratch_rows, in_features, torch.float32)
        self._values = memory_of(self._scratch).view(scratch_rows // block, 1, in_features, block)
        self._codes: list[torch.Tensor] = []
        self._scales: list[torch.Tensor] = []
        self._tail: OneDnnLinear | None = None
        """The last rows, if they don't fill the scratch matrix."""

    @classmethod
    def read(cls, out_features: int, in_features: int, read_rows: ReadRows) -> CompactLinear | None:
        """None where there is no compact form, no kernel, or a layout that is not known; then nothing was lost."""
        rows = _scratch_rows(out_features, in_features)
        if rows is None or read_rows(0, 1) is None:
            return None
        block = blank_size(rows, in_features, torch.float32)
        if block is None or not _exact(block):
            return None
        linear = cls(out_features, in_features, rows, block)
        for start in range(0, out_features, rows):
            part = read_rows(start, min(start + rows, out_features))
            if part is None:
                return None
            linear._append(part)
        return linear

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        result = rows.new_empty(*rows.shape[:-1], self.out_features)
        end = 0
        for index, codes in enumerate(self._codes):
            values = self._values.view(codes.shape)
            values.copy_(codes)
            if self._scales:
                values.mul_(self._scales[index])
            start, end = end, end + self._rows
            result[..., start:end] = product(rows, self._scratch)
        if self._tail is not None:
            result[..., end:] = self._tail(rows)
        return result

    def _append(self, part: CompactRows) -> None:
        rows, columns = part.codes.shape
        if rows < self._rows:
            self._tail = OneDnnLinear(part.expand(), None, packed=True)
            self.size_bytes += rows * columns * 4
            return
        groups = 1 if part.scales is None else part.scales.shape[1]
        codes = part.codes.view(rows // self._block, self._block, groups, columns // groups)
        self._codes.append(codes.permute(0, 2, 3, 1).contiguous())
        self.size_bytes += self._codes[-1].nbytes
        if part.scales is not None:
            scales = part.scales.view(rows // self._block, self._block, groups, 1)
            self._scales.append(scales.permute(0, 2, 3, 1).contiguous())
            self.size_bytes += self._scales[-1].nbytes


def _scratch_rows(out_features: int, in_features: int) -> int | None:
    """At best a divisor of the matrix's rows."""
    most = min(SCRATCH_BYTES // (4 * in_features), out_features) // _STEP * _STEP
    fitting = (rows for rows in range(most, most // 2, -_STEP) if out_features % rows == 0)
    return next(fitting, most) or None


@cache
def _exact(block: int) -> bool:
    """Whether results really are those of the whole matrix: tried once, on a small one."""
    generator = torch.Generator().manual_seed(0)
    part = CompactRows(
        torch.randint(-128, 128, (2 * _STEP, 256), generator=generator, dtype=torch.int8),
        torch.rand(2 * _STEP, 8, generator=generator),
    )
    if blank_size(_STEP, 256, torch.float32) != block:
        return False
    linear = CompactLinear(2 * _STEP, 256, _STEP, block)
    for start in (0, _STEP):
        linear._append(part.slice(start, start + _STEP))
    whole = OneDnnLinear(part.expand(), None, packed=True)
    inputs = [torch.randn(rows, 256, generator=generator) for rows in (1, 3, 40)]
    with torch.inference_mode():
        return all(torch.equal(linear(rows), whole(rows)) for rows in inputs)
