"""Attention on an NVIDIA card: each row of a pass against its own session's cache, through tables of block addresses.

PagedAttention (Kwon et al., SOSP 2023), each row's positions divided among several programs as in Flash-Decoding (Dao
et al., 2023). How they are divided depends on the row's position alone, so that a row gets the same bits in any
company. All that changes from pass to pass is in the card's memory: the kernels can be part of a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl

from peers.kv_cache import BLOCK

PARTS: Final = 8
"""Programs that share a row's positions."""
_LEAST: Final = 16
"""Rows and columns of what the card's units multiply."""
_ELEMENTS: Final = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True, slots=True)
class PagedRows:
    """The rows of a pass, as :class:`peers.attention.Spans` are on a CPU."""

    tables: torch.Tensor
    """Of each row, the address of its cache's table of block addresses: int64 ``[rows]``, on the card."""
    positions: torch.Tensor
    """int64 ``[rows]``, on the card; -1 for a row that is nobody's: nothing of it is read, and what comes out is 0."""
    first_layer: int
    """Of the caches."""

    def attend(
        self, layer: int, window: int | None, scale: float, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """See :meth:`peers.attention.Spans.attend`."""
        query, key, value = (part if part.stride(2) == 1 else part.contiguous() for part in (query, key, value))
        (heads, rows, dim), kv_heads = query.shape, key.shape[0]
        element, layer = _ELEMENTS[key.dtype], layer - self.first_layer
        width = max(_LEAST, triton.next_power_of_2(dim))
        places = (self.tables, self.positions, layer)
        _put[rows, kv_heads](
            key, key.stride(0), key.stride(1), value, value.stride(0), value.stride(1), *places,
            element, kv_heads, dim, width, BLOCK,
        )  # fmt: skip
        sums = query.new_empty((rows, heads, PARTS, dim), dtype=torch.float32)
        weights = query.new_empty((rows, heads, PARTS, 2), dtype=torch.float32)
        group = heads // kv_heads
        padded = max(_LEAST, triton.next_power_of_2(group))
        _attend[rows, kv_heads, PARTS](
            query, query.stride(0), query.stride(1), *places, sums, weights, window or 0, scale,
            element, kv_heads, group, padded, dim, width, BLOCK, PARTS,
        )  # fmt: skip
        result = query.new_empty((rows, heads, dim))
        _merge[rows, heads](sums, weights, result, self.positions, window or 0, heads, dim, width, BLOCK, PARTS)
        return result


@triton.jit
def _rows_of(table, index, layer, part, head, ELEMENT: tl.constexpr, KV_HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Where a block has the keys (``part`` 0) or values (1) of a layer and head."""
    block = tl.load(table + index).to(tl.pointer_type(ELEMENT))
    return block + ((layer * 2 + part) * KV_HEADS + head) * ROWS


@triton.jit
def _put(
    keys, key_head, key_row, values, value_head, value_row, tables, positions, layer,
    ELEMENT: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    position = tl.load(positions + row)
    if position >= 0:
        table = tl.load(tables + row).to(tl.pointer_type(tl.int64))
        column = tl.arange(0, WIDTH)
        there = column < DIM
        key = tl.load(keys + head * key_head + row * key_row + column, there)
        value = tl.load(values + head * value_head + row * value_row + column, there)
        at = position % BLOCK * DIM + column
        tl.store(_rows_of(table, position // BLOCK, layer, 0, head, ELEMENT, KV_HEADS, BLOCK * DIM) + at, key, there)
        tl.store(_rows_of(table, position // BLOCK, layer, 1, head, ELEMENT, KV_HEADS, BLOCK * DIM) + at, value, there)


@triton.jit
def _reach(position, window, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """The first position that a row sees, the blocks ``begin .. end - 1`` with all of them, and how many are a part;
    none for a row that is nobody's."""
    first = tl.maximum(position - window + 1, 0) if window else position * 0
    begin, end = first // BLOCK, (position + BLOCK) // BLOCK
    return first, begin, end, tl.cdiv(end - begin, PARTS)


@triton.jit
def _attend(
    queries, query_head, query_row, tables, positions, layer, sums, weights, window, scale,
    ELEMENT: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A part of a row's positions, for the query heads that share a kv head: weighted sums, largest score, weight."""
    row, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    position = tl.load(positions + row)
    first, begin, end, each = _reach(position, window, BLOCK, PARTS)
    start = begin + part * each
    if start < end:
        table = tl.load(tables + row).to(tl.pointer_type(tl.int64))
        member, column, place = tl.arange(0, PADDED), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
        own, there = member[:, None] < GROUP, column[None, :] < DIM
        at = (head * GROUP + member)[:, None] * query_head + row * query_row + column[None, :]
        query = tl.load(queries + at, own & there, 0.0)
        most = tl.full([PADDED], float("-inf"), tl.float32)
        total = tl.zeros([PADDED], tl.float32)
        found = tl.zeros([PADDED, WIDTH], tl.float32)
        for index in range(start, tl.minimum(start + each, end)):
            seen = index * BLOCK + place
            seen = (seen >= first) & (seen <= position)
            inside = place[:, None] * DIM + column[None, :]
            key_rows = _rows_of(table, index, layer, 0, head, ELEMENT, KV_HEADS, BLOCK * DIM)
            key = tl.load(key_rows + inside, seen[:, None] & there, 0.0)
            scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
            scores = tl.where(seen[None, :], scores, float("-inf"))
            larger = tl.maximum(most, tl.max(scores, 1))
            kept, share = tl.exp(most - larger), tl.exp(scores - larger[:, None])
            value_rows = _rows_of(table, index, layer, 1, head, ELEMENT, KV_HEADS, BLOCK * DIM)
            value = tl.load(value_rows + inside, seen[:, None] & there, 0.0)
            found = found * kept[:, None] + tl.dot(share.to(ELEMENT), value, input_precision="ieee")
            total = total * kept + tl.sum(share, 1)
            most = larger
        to = ((row * KV_HEADS + head) * GROUP + member) * PARTS + part
        tl.store(sums + to[:, None] * DIM + column[None, :], found, own & there)
        tl.store(weights + to * 2, most, member < GROUP)
        tl.store(weights + to * 2 + 1, total, member < GROUP)


@triton.jit
def _merge(
    sums, weights, result, positions, window, heads,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + row)
    _, begin, end, each = _reach(position, window, BLOCK, PARTS)
    part, column = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    one = row * heads + tl.program_id(1)
    at, there = one * PARTS + part, begin + part * each < end
    most = tl.load(weights + at * 2, there, float("-inf"))
    total = tl.load(weights + at * 2 + 1, there, 0.0)
    kept = tl.where(there, tl.exp(most - tl.max(most, 0)), 0.0)
    found = tl.load(sums + at[:, None] * DIM + column[None, :], there[:, None] & (column[None, :] < DIM), 0.0)
    whole = tl.sum(found * kept[:, None], 0) / tl.where(position >= 0, tl.sum(total * kept, 0), 1.0)
    tl.store(result + one * DIM + column, whole.to(result.dtype.element_ty), column < DIM)
