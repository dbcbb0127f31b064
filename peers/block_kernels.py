"""The compiled kernels: products with matrices as they are stored, and decoder layers made of them.

PyTorch's kernels for 4 and 8 bit weights (``_weight_int4pack_mm_for_cpu``, ``_weight_int8pack_mm``) are fast with
bfloat16 rows only, and round each product to bfloat16: a stage that replays a session's rows as one chunk would get
other numbers than the lost one had. These compute in float32 throughout, as fast, and read GGUF's blocks as they
are. A machine without a compiler expands blocks with torch: the same numbers to within float32 rounding, but slowly.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Final

import torch

from peers.compiled import load_kernels
from peers.weights.blocks import BLOCK, BlockKind, Blocks, to_blocks
from swarm.errors import Internal
from swarm.sampling import Floats

SOURCE: Final = Path(__file__).with_name("block_kernels.c")
FLOAT32: Final = 4
"""What the kernels call a float32 matrix that oneDNN has packed; the others are those of :class:`BlockKind`."""
Numbers = ctypes.Array[ctypes.c_int64]
Product = Callable[[torch.Tensor, torch.Tensor, int, int], None]
"""``(rows, out, first, stop)``: columns ``first`` to ``stop`` of ``out``, both of contiguous float32."""


class BlockKernels:
    """The functions of ``block_kernels.c``. May be called from several threads at once."""

    def __init__(self, path: Path) -> None:
        """Raises :class:`OSError` or :class:`AttributeError` for a library that is not ours."""
        library = ctypes.CDLL(str(path))
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._product = library.product
        self._product.argtypes = [ctypes.c_int, pointer, number, number, pointer, number, pointer, number]
        self._product.restype = ctypes.c_int
        self._run_layers = library.run_layers
        self._run_layers.argtypes = [
            pointer, number, number, pointer, pointer, pointer, number, number, number, ctypes.c_float, ctypes.c_float,
            pointer, pointer, pointer, number, number, number, pointer, pointer,
        ]  # fmt: skip
        self._run_layers.restype = ctypes.c_int
        library.lanes.restype = ctypes.c_int
        self.lanes: int = library.lanes()
        """Floats of one vector."""
        self._expand = library.expand
        self._expand.argtypes = [ctypes.c_int, pointer, number, number, pointer]
        self._expand.restype = ctypes.c_int

    def bind(self, matrix: Blocks) -> Product:
        """The function that multiplies with ``matrix``: what never changes is looked up once."""
        kind, data, row_bytes = matrix.kind.value, matrix.data.data_ptr(), matrix.data.shape[1]
        outputs, blocks, run = matrix.rows, matrix.columns // BLOCK, self._product

        def product(rows: torch.Tensor, out: torch.Tensor, first: int, stop: int) -> None:
            start, place = data + first * row_bytes, out.data_ptr() + 4 * first
            if run(kind, start, stop - first, blocks, rows.data_ptr(), rows.shape[0], place, outputs):
                raise Internal("no memory for a product")

        return product

    def run_layers(
        self, layers: Numbers, count: int, cos: int, signed_sin: int, positions: Numbers, heads: int, kv_heads: int,
        dim: int, scale: float, epsilon: float, put: int, attend: int, spans: Numbers, sessions: int, threads: int,
        exact: bool, given: Floats, hidden: Floats,
    ) -> bool:  # fmt: skip
        """Fills ``hidden`` from ``given``, see ``block_kernels.c``; both are contiguous. ``cos`` and ``signed_sin`` are
        addresses of such arrays, ``put`` and ``attend`` of the functions in ``attention_kernel.c``; ``spans`` is what
        that makes of the sessions. Returns whether all that came out is finite."""
        found = self._run_layers(
            layers, count, given.shape[0], cos, signed_sin, positions, heads, kv_heads, dim, scale, epsilon, put,
            attend, spans, sessions, threads, exact, given.ctypes.data, hidden.ctypes.data,
        )  # fmt: skip
        if found < 0:
            raise Internal("no memory for a pass")
        return found == 0  # type: ignore[no-any-return]

    def expand(self, matrix: Blocks, first: int, stop: int, out: torch.Tensor) -> None:
        """Rows ``first`` to ``stop`` of the matrix, into the contiguous float32 ``out``."""
        row_bytes = matrix.data.shape[1]
        start, blocks = matrix.data.data_ptr() + first * row_bytes, matrix.columns // BLOCK
        if self._expand(matrix.kind.value, start, stop - first, blocks, out.data_ptr()):
            raise Internal("no memory to expand a matrix")


@cache
def block_kernels() -> BlockKernels | None:
    """None where there is no compiler, or what it made does not work; said once in the log."""
    return load_kernels(SOURCE, BlockKernels, _right, "no kernels for quantised weights, products will be slow")


def _right(kernels: BlockKernels) -> bool:
    generator = torch.Generator().manual_seed(0)
    weights, rows = torch.randn(9, 96, generator=generator), torch.randn(5, 96, generator=generator)
    for kind in BlockKind:
        matrix = to_blocks(weights, kind)
        product, expanded, wanted = torch.empty(5, 9), torch.empty(9, 96), matrix.expand()
        kernels.bind(matrix)(rows, product, 0, 9)
        kernels.expand(matrix, 0, 9, expanded)
        if not torch.allclose(expanded, wanted, atol=1e-6) or not torch.allclose(product, rows @ wanted.T, atol=1e-4):
            return False
    return True
