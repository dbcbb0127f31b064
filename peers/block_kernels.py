"""The compiled kernels: products with matrices as they are stored, and decoder layers made of them.

PyTorch's kernels for 4 and 8 bit weights (``_weight_int4pack_mm_for_cpu``, ``_weight_int8pack_mm``) are fast with
bfloat16 rows only, and round each product to bfloat16: a stage that replays a session's rows as one chunk would get
other numbers than the lost one had. These compute in float32 throughout, as fast, from the numbers of GGUF's blocks
in an order of their own. A machine without a compiler expands blocks with torch: the same results to within float32
rounding, but slowly.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch.nn import functional

from peers.compiled import load_kernels
from peers.weights.blocks import BLOCK, BlockKind, Blocks, to_blocks
from swarm.errors import Internal
from swarm.sampling import Floats

SOURCE: Final = Path(__file__).with_name("block_kernels.c")
FLOAT32: Final = 4
"""What the kernels call a float32 matrix that oneDNN has packed; the others are those of :class:`BlockKind`."""
Numbers = ctypes.Array[ctypes.c_int64]
Matrix = tuple[int, int, int, int, int]
"""A ``matrix`` of the C file: kind, address, outputs, inputs, outputs that stand side by side."""
PANEL: Final = 64
"""Outputs that stand side by side."""
_PACK_BYTES: Final = 2**20
"""Of codes that are turned round at once; the intermediate values are several times that."""


@dataclass(frozen=True, slots=True)
class Panels:
    """A matrix ``[outputs, inputs]`` in the layout of ``block_products.h``: the numbers of :class:`Blocks`."""

    kind: BlockKind
    outputs: int
    inputs: int
    data: torch.Tensor
    """``[panels, bytes of a panel]`` of uint8."""

    @classmethod
    def of(cls, matrix: Blocks) -> Panels:
        step = max(1, _PACK_BYTES // (PANEL * matrix.columns))
        panel_bytes = PANEL * matrix.data.shape[1]
        data = torch.empty(-(-matrix.rows // PANEL), panel_bytes, dtype=torch.uint8)
        for first in range(0, len(data), step):
            rows = matrix.data[first * PANEL : (first + step) * PANEL]
            data[first : first + step] = _panels(Blocks(matrix.kind, rows))
        return cls(matrix.kind, matrix.rows, matrix.columns, data)

    @property
    def described(self) -> Matrix:
        return self.kind.value, self.data.data_ptr(), self.outputs, self.inputs, PANEL


def _panels(matrix: Blocks) -> torch.Tensor:
    """``[panels, bytes of a panel]``; what is missing in the last one is filled with zeros."""
    data = functional.pad(matrix.data, (0, 0, 0, -matrix.rows % PANEL))
    if matrix.kind is BlockKind.BFLOAT16:
        pairs = data.view(torch.int32).view(-1, PANEL, matrix.columns // 2)
        return pairs.transpose(1, 2).flatten(1).view(torch.uint8)
    factors, codes = Blocks(matrix.kind, data).parts()
    blocks = factors.shape[1]
    if matrix.kind is not BlockKind.Q8_0:
        codes = torch.cat((codes & 15, codes >> 4), -1)
    turned = codes.view(-1, PANEL, blocks, BLOCK).permute(0, 2, 3, 1)
    if matrix.kind is not BlockKind.Q8_0:
        turned = turned[..., : PANEL // 2] | turned[..., PANEL // 2 :] << 4
    halves = factors.view(-1, PANEL, blocks, factors.shape[2]).permute(0, 2, 3, 1).contiguous().view(torch.uint8)
    return torch.cat((halves.flatten(2), turned.flatten(2)), 2).flatten(1)


class BlockKernels:
    """The functions of ``block_kernels.c``. May be called from several threads at once."""

    def __init__(self, path: Path) -> None:
        """Raises :class:`OSError` or :class:`AttributeError` for a library that is not ours."""
        library = ctypes.CDLL(str(path))
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._product = library.product
        self._product.argtypes = [pointer, number, number, pointer, number, pointer]
        self._product.restype = ctypes.c_int
        self._run_layers = library.run_layers
        self._run_layers.argtypes = [
            pointer, number, number, pointer, pointer, pointer, number, number, number, number, ctypes.c_float,
            ctypes.c_float, pointer, pointer, pointer, pointer, number, number, pointer, pointer,
        ]  # fmt: skip
        self._run_layers.restype = ctypes.c_int
        library.lanes.restype = ctypes.c_int
        self.lanes: int = library.lanes()
        """Floats of one vector."""
        self.multiplies_bfloat16: bool = library.multiplies_bfloat16() != 0
        """Whether the CPU does that itself, faster than float32, and this process may use it."""
        self._round_panels = library.round_panels
        self._round_panels.argtypes = [pointer, number, number, number, pointer]
        self._round_panels.restype = None

    def product(self, rows: torch.Tensor, matrix: Panels, first: int, stop: int, out: torch.Tensor) -> None:
        """Columns of panels ``first`` to ``stop`` of ``out = rows @ matrix.T``; both are contiguous float32."""
        described = _numbers(matrix.described)
        if self._product(described, first, stop, rows.data_ptr(), rows.shape[0], out.data_ptr()):
            raise Internal("no memory for a product")

    def round_panels(self, matrix: Panels, first: int, stop: int, packed: int, address: int) -> None:
        """Panels ``first`` to ``stop`` of a matrix of 4 or 8 bits a weight, to ``address``: bfloat16 in the order that
        :func:`peers.linear.packed_size` tells of. ``packed`` divides ``PANEL``."""
        self._round_panels(_numbers(matrix.described), first, stop, packed, address)

    def run_layers(
        self, layers: Numbers, count: int, cos: int, signed_sin: int, positions: Numbers, heads: int, kv_heads: int,
        dim: int, rounded: bool, scale: float, epsilon: float, norm: int | None, put: int, attend: int, spans: Numbers,
        sessions: int, threads: int, given: Floats, hidden: Floats,
    ) -> bool:  # fmt: skip
        """Fills ``hidden`` from ``given``, see ``block_kernels.c``; both are contiguous. ``cos`` and ``signed_sin`` are
        addresses of such arrays, ``put`` and ``attend`` of the functions in ``attention_kernel.c``; ``spans`` is what
        that makes of the sessions. Returns whether all that came out is finite."""
        found = self._run_layers(
            layers, count, given.shape[0], cos, signed_sin, positions, heads, kv_heads, dim, rounded, scale, epsilon,
            norm, put, attend, spans, sessions, threads, given.ctypes.data, hidden.ctypes.data,
        )  # fmt: skip
        if found < 0:
            raise Internal("no memory for a pass")
        return found == 0  # type: ignore[no-any-return]


def _numbers(matrix: Matrix) -> Numbers:
    return (ctypes.c_int64 * len(matrix))(*matrix)


@cache
def block_kernels() -> BlockKernels | None:
    """None where there is no compiler, or what it made does not work; said once in the log."""
    return load_kernels(SOURCE, BlockKernels, _right, "no kernels for quantised weights, products will be slow")


def _right(kernels: BlockKernels) -> bool:
    generator = torch.Generator().manual_seed(0)
    weights, rows = torch.randn(70, 96, generator=generator), torch.randn(9, 96, generator=generator)
    for kind in BlockKind:
        matrix = to_blocks(weights, kind)
        panels, product = Panels.of(matrix), torch.empty(9, 70)
        kernels.product(rows, panels, 0, 2, product)
        if not torch.allclose(product, rows @ matrix.expand().T, atol=1e-4):
            return False
    return True
