"""Attention on a CPU, computed in float32: ``attention_kernel.c``, and the table of sessions that it takes.

A session's decode step attends from one row. With a call of torch for each session and layer, calling takes several
times as long as computing, and sixteen sessions in a pass spend more time there than in all matrix products. For a
prompt's chunk it takes half the time of torch's own, and needs no copy of the cache with its positions adjacent.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch.nn.functional import scaled_dot_product_attention

from peers.compiled import load_kernels, shared_out
from peers.kv_cache import BLOCK, SequenceCache
from swarm.errors import Internal
from swarm.kv import MODEL
from swarm.types import LayerRange

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peers.attention import Span

SOURCE: Final = Path(__file__).with_name("attention_kernel.c")
LANES: Final = 16
"""Head sizes are multiples of this: floats of the widest vector."""


Rows = ctypes.Array[ctypes.c_int64]
"""What the kernel wants to know of each session's rows: a ``span`` of the C file."""
RECORD: Final = 7
"""Numbers in a span."""


class AttentionKernel:
    """May be called from several threads at once."""

    def __init__(self, path: Path) -> None:
        """Raises :class:`OSError` or :class:`AttributeError` for a library that is not ours."""
        library = ctypes.CDLL(str(path))
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._put, self._attend = library.put, library.attend
        self._put.argtypes = [pointer, *[number] * 4, pointer, number, number, pointer, number, number]
        self._put.restype = None
        self._attend.argtypes = [pointer, *[number] * 6, ctypes.c_float, pointer, *[number] * 4, pointer]
        self._attend.restype = ctypes.c_int
        self.put_address = ctypes.cast(self._put, ctypes.c_void_p).value or 0
        self.attend_address = ctypes.cast(self._attend, ctypes.c_void_p).value or 0
        """Of the functions, for the kernels that run whole layers."""

    @staticmethod
    def misfit(heads: int, kv_heads: int, dim: int) -> bool:
        """Whether these numbers are unusual ones, which the kernel does not take."""
        return bool(dim % LANES or heads % kv_heads)

    @classmethod
    def takes(cls, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Of ``[heads, rows, dim]``: float32 on a CPU, of usual shapes."""
        dense = query.stride(2) == key.stride(2) == value.stride(2) == 1
        fits = not cls.misfit(query.shape[0], key.shape[0], query.shape[2])
        return fits and dense and query.dtype == torch.float32 and query.device.type == "cpu"

    def attend(
        self, spans: Rows, layer: int, window: int | None, scale: float,
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor,
    ) -> None:  # fmt: skip
        """``query`` is ``[heads, rows, dim]``, ``key`` and ``value`` ``[kv_heads, rows, dim]``; the rows that ``spans``
        name go into the caches, and their results into the contiguous ``out``, ``[rows, heads, dim]``."""
        sessions, (heads, rows, dim), kv_heads = len(spans) // RECORD, query.shape, key.shape[0]
        self._put(
            spans, sessions, layer, kv_heads, dim, key.data_ptr(), key.stride(0), key.stride(1),
            value.data_ptr(), value.stride(0), value.stride(1),
        )  # fmt: skip

        def work(first: int, stop: int) -> None:
            if self._attend(
                spans, sessions, layer, window or 0, heads, kv_heads, dim, scale, query.data_ptr(), query.stride(0),
                query.stride(1), first, stop, out.data_ptr(),
            ):  # fmt: skip
                raise Internal("no memory to attend")

        shared_out(work, rows * kv_heads)


def table(spans: Sequence[Span]) -> Rows:
    """Valid as long as the caches are, and what it says of blocks until one of them is truncated."""
    rows = [
        (c.blocks_address, BLOCK, c.row_kind, c.layers.start, span.start, span.count, span.offset)
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
    seen, count, heads, kv_heads, dim = BLOCK + 19, 5, 6, 2, 48
    past = torch.randn(2, kv_heads, seen, dim, generator=generator)
    query = 3 * torch.randn(heads, count, dim, generator=generator)
    key, value = past[:, :, seen - count :]
    mask = torch.ones(count, seen, dtype=torch.bool).tril(seen - count)
    wanted = scaled_dot_product_attention(query[None], past[:1], past[1:], mask, scale=0.2, enable_gqa=True)
    numbers, rounded = (torch.float32, 1e-5), (torch.bfloat16, 0.1)
    for kind, (dtype, close) in ((MODEL, numbers), (MODEL, rounded), ("int8", (torch.float32, 0.1))):
        cache = SequenceCache(LayerRange(0, 1), kv_heads, dim, seen, dtype, kind=kind)
        cache.grow(0, seen)
        cache.write(0, 0, past[0, :, :-count], past[1, :, :-count])
        span = (ctypes.c_int64 * RECORD)(cache.blocks_address, BLOCK, cache.row_kind, 0, seen - count, count, 0)
        out = torch.empty(count, heads, dim)
        kernel.attend(span, 0, None, 0.2, query, key, value, out)
        if not torch.allclose(out, wanted[0].transpose(0, 1), atol=close):
            return False
    return True
