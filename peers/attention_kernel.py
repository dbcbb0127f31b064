"""Attention of few rows, of many sessions in one call: ``attention_kernel.c``, and the table of sessions that it takes.

A session's decode step attends from one row. With a call of torch for each session and layer, calling takes several
times as long as computing, and sixteen sessions in a pass spend more time there than in all matrix products.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch.nn.functional import scaled_dot_product_attention

from peers.compiled import load_kernels
from peers.kv_cache import BLOCK, SequenceCache
from swarm.errors import Internal
from swarm.kv import MODEL
from swarm.types import LayerRange

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peers.attention import Span

SOURCE: Final = Path(__file__).with_name("attention_kernel.c")
LANES: Final = 8
MOST_GROUP: Final = 16
"""Query heads that share a kv head."""


Rows = ctypes.Array[ctypes.c_int64]
"""What the kernel wants to know of each session's rows: a record of numbers, see ``attend`` in the C file."""
RECORD: Final = 7
"""Numbers in a record."""


class AttentionKernel:
    """May be called from several threads at once."""

    def __init__(self, path: Path) -> None:
        """Raises :class:`OSError` or :class:`AttributeError` for a library that is not ours."""
        self._attend = ctypes.CDLL(str(path)).attend
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        numbers = [number, number]
        self._attend.argtypes = [
            pointer, *numbers, *numbers, *numbers, ctypes.c_float,
            pointer, *numbers, pointer, *numbers, pointer, *numbers, pointer,
        ]  # fmt: skip
        self._attend.restype = ctypes.c_int

    @property
    def address(self) -> int:
        """Of the function, for the kernels that run whole layers."""
        return ctypes.cast(self._attend, ctypes.c_void_p).value or 0

    @staticmethod
    def misfit(heads: int, kv_heads: int, dim: int) -> bool:
        """Whether these numbers are unusual ones, which the kernel does not take."""
        return bool(dim % LANES or heads % kv_heads or heads // kv_heads > MOST_GROUP)

    @classmethod
    def takes(cls, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Of ``[1, heads, rows, dim]``: float32 on a CPU, of usual shapes."""
        dense = query.stride(3) == key.stride(3) == value.stride(3) == 1
        fits = not cls.misfit(query.shape[1], key.shape[1], query.shape[3])
        return fits and dense and query.dtype == torch.float32 and query.device.type == "cpu"

    def attend(
        self, spans: Rows, layer: int, window: int | None, scale: float,
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor,
    ) -> None:  # fmt: skip
        """``query`` is ``[heads, rows, dim]``, ``key`` and ``value`` ``[kv_heads, rows, dim]``; the rows that ``spans``
        name go into the caches, and their results into the contiguous ``out``, ``[rows, heads, dim]``."""
        if self._attend(
            spans, len(spans) // RECORD, layer, window or 0, query.shape[0], key.shape[0], query.shape[2], scale,
            query.data_ptr(), query.stride(0), query.stride(1), key.data_ptr(), key.stride(0), key.stride(1),
            value.data_ptr(), value.stride(0), value.stride(1), out.data_ptr(),
        ):  # fmt: skip
            raise Internal("no memory to attend")


def table(spans: Sequence[Span]) -> Rows:
    """Valid as long as the caches are, and what it says of blocks until one of them is truncated."""
    rows = [
        (c.blocks_address, BLOCK, c.kind != MODEL, c.layers.start, span.start, span.count, span.offset)
        for span in spans
        for c in (span.cache,)
    ]
    return (ctypes.c_int64 * (RECORD * len(rows)))(*(number for row in rows for number in row))


@cache
def attention_kernel() -> AttentionKernel | None:
    """None where there is no compiler, or what it made does not work; said once in the log."""
    return load_kernels(SOURCE, AttentionKernel, _right, "no kernel for attention, many sessions will be slower")


def _right(kernel: AttentionKernel) -> bool:
    generator = torch.Generator().manual_seed(0)
    seen, heads, kv_heads, dim = BLOCK + 19, 6, 2, 24
    past = torch.randn(2, kv_heads, seen, dim, generator=generator)
    query = 3 * torch.randn(heads, 1, dim, generator=generator)
    key, value = past[:, :, seen - 1 :]
    wanted = scaled_dot_product_attention(query[None], past[:1], past[1:], scale=0.2, enable_gqa=True)
    for kind, close in ((MODEL, 1e-5), ("int8", 0.1)):
        cache = SequenceCache(LayerRange(0, 1), kv_heads, dim, seen, torch.float32, kind=kind)
        cache.grow(0, seen)
        cache.write(0, 0, past[0, :, :-1], past[1, :, :-1])
        span = (ctypes.c_int64 * RECORD)(cache.blocks_address, BLOCK, kind != MODEL, 0, seen - 1, 1, 0)
        out = torch.empty(1, heads, dim)
        kernel.attend(span, 0, None, 0.2, query, key, value, out)
        if not torch.allclose(out[0], wanted[0, :, 0], atol=close):
            return False
    return True
