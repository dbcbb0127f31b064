"""Matrix products on an NVIDIA card, of a row the same bits in any company, also from weights that stay in blocks.

cuBLAS has other kernels for few rows than for many, and sums differ in their last bits: a stage that replays a
session's rows in one chunk would get other numbers than the lost one had. Here the inputs are summed in one order,
whatever the tile. torch's kernels for small weights (``_weight_int4pack_mm``, ``_weight_int8pack_mm``) want scales in
bfloat16, or one for a whole row, which is not what GGUF's blocks have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl

from peers.weights.blocks import BLOCK, BlockKind, Blocks


@dataclass(frozen=True, slots=True)
class _Tile:
    rows: int
    outputs: int
    warps: int
    stages: int


_FEW, _MANY = _Tile(32, 64, 4, 3), _Tile(64, 128, 8, 4)
"""Measured on an H100. Of float32 fewer stages fit into the fast memory of smaller cards."""
_FEWER_STAGES: Final = 2
_STEP: Final = 2
"""Blocks of inputs that a program reads at a time."""
_PROGRAMS: Final = 512
"""So many keep a card's memory busy: where there are fewer tiles, several share one, each some of the inputs."""
_NUMBERS: Final = -1
"""Beside the values of :class:`BlockKind`: a matrix as it is."""


class CardMatrix:
    """``[outputs, inputs]``: blocks, their scales apart from their codes, or numbers."""

    def __init__(self, matrix: Blocks | torch.Tensor) -> None:
        if isinstance(matrix, Blocks) and matrix.kind is BlockKind.BFLOAT16:
            matrix = matrix.data.view(torch.bfloat16)
        if isinstance(matrix, Blocks):
            self._kind, self.outputs, self.inputs = matrix.kind.value, matrix.rows, matrix.columns
            self._factors, codes = matrix.parts()
            self._codes = codes.contiguous()
        else:
            self._kind, (self.outputs, self.inputs) = _NUMBERS, matrix.shape
            self._codes = self._factors = matrix.contiguous()
        steps = triton.cdiv(self.inputs, BLOCK * _STEP)
        tiles = triton.cdiv(self.outputs, _FEW.outputs)
        self._parts = max(1, min(_PROGRAMS // tiles, steps // 2))
        self._steps = triton.cdiv(steps, self._parts)

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows @ matrix.T`` for contiguous ``[rows, inputs]`` of any float dtype, summed in float32."""
        count = rows.shape[0]
        tile = _FEW if count <= _FEW.rows else _MANY
        apart = tile is _FEW and self._parts > 1
        result = rows.new_empty((count, self.outputs))
        sums = rows.new_empty((self._parts, count, self.outputs), dtype=torch.float32) if apart else result
        _product[triton.cdiv(count, tile.rows), triton.cdiv(self.outputs, tile.outputs), self._parts if apart else 1](
            rows, self._codes, self._factors, sums, count, self.outputs, self.inputs, self._steps,
            1 if apart else self._parts, self._kind, tile.rows, tile.outputs, _STEP, BLOCK,
            num_warps=tile.warps, num_stages=tile.stages if rows.itemsize == 2 else _FEWER_STAGES,
        )  # fmt: skip
        if apart:
            _total[triton.cdiv(result.numel(), 1024),](sums, result, result.numel(), self._parts, 1024)
        return result


# Once compiled for a matrix, a kernel serves any number of rows.
@triton.jit(do_not_specialize=["count", "steps", "parts"])
def _product(
    rows, codes, factors, sums, count, outputs, inputs, steps, parts,
    KIND: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of the product; of a part of the inputs, or of ``parts`` one after the other."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(1).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    first = tl.program_id(2) * steps
    # Of 4 bits, byte n of a block holds those of columns n and n + 16: two products, of the lower and the upper ones.
    WIDE: tl.constexpr = BLOCK // 2 if KIND == 0 or KIND == 1 else BLOCK
    FACTORS: tl.constexpr = 2 if KIND == 1 else 1
    blocks = tl.cdiv(inputs, BLOCK)
    each, at = tl.arange(0, STEP), tl.arange(0, STEP * WIDE)
    given = rows + row[None, :].to(tl.int64) * inputs
    is_row, is_output = row[None, :] < count, output[:, None] < outputs
    total = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for part in range(parts):
        found = tl.zeros([OUTPUTS, ROWS], tl.float32)
        for step in range(first + part * steps, first + part * steps + steps):
            column = step * STEP * BLOCK + at // WIDE * BLOCK + at % WIDE
            here = column < inputs
            few = tl.load(given + column[:, None], is_row & here[:, None], 0.0)
            if KIND < 0:
                weight = tl.load(codes + output[:, None] * inputs + column[None, :], is_output & here[None, :], 0.0)
                found = tl.dot(weight.to(few.dtype), few, found, input_precision="ieee")
            else:
                code = tl.load(
                    codes + output[:, None] * (blocks * WIDE) + (step * STEP * WIDE + at)[None, :],
                    is_output & here[None, :], 0,
                )  # fmt: skip
                block = step * STEP + each
                place = factors + (output[:, None] * blocks + block[None, :]) * FACTORS
                whole = is_output & (block < blocks)[None, :]
                scale = tl.load(place, whole, 0.0).to(tl.float32)[:, :, None]
                if KIND == 2:
                    weight = _scaled(code.to(tl.int8, bitcast=True), scale, 0.0, OUTPUTS, STEP, WIDE)
                    found = tl.dot(weight.to(few.dtype), few, found, input_precision="ieee")
                else:
                    shift = tl.load(place + 1, whole, 0.0).to(tl.float32)[:, :, None] if KIND == 1 else -8 * scale
                    low = _scaled(code & 15, scale, shift, OUTPUTS, STEP, WIDE)
                    high = _scaled(code >> 4, scale, shift, OUTPUTS, STEP, WIDE)
                    found = tl.dot(low.to(few.dtype), few, found, input_precision="ieee")
                    more = tl.load(given + column[:, None] + WIDE, is_row & here[:, None], 0.0)
                    found = tl.dot(high.to(few.dtype), more, found, input_precision="ieee")
        total += found
    to = (tl.program_id(2) * count + row[None, :].to(tl.int64)) * outputs + output[:, None]
    tl.store(sums + to, total.to(sums.dtype.element_ty), is_row & is_output)


@triton.jit
def _scaled(code, scale, shift, OUTPUTS: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr):
    numbers = tl.reshape(code.to(tl.float32), [OUTPUTS, STEP, WIDE]) * scale + shift
    return tl.reshape(numbers, [OUTPUTS, STEP * WIDE])


@triton.jit(do_not_specialize=["numbers", "parts"])
def _total(sums, result, numbers, parts, SIZE: tl.constexpr):
    """The parts' sums, in the order in which :func:`_product` would take them."""
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros([SIZE], tl.float32)
    for part in range(parts):
        total += tl.load(sums + part * numbers + at, at < numbers, 0.0)
    tl.store(result + at, total.to(result.dtype.element_ty), at < numbers)
