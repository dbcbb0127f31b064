from __future__ import annotations

import pytest
import torch

from peers.kv_cache import BLOCK, DenseRows, SequenceCache
from swarm.errors import BadRequest, Gap, TooLong
from swarm.types import LayerRange

LAYERS = LayerRange(3, 5)
HEADS, DIM = 2, 8
LONG = 3 * BLOCK + 5


def filled(count: int, kind: str = "model", dtype: torch.dtype = torch.float32) -> tuple[SequenceCache, torch.Tensor]:
    """A cache, and what was written to it: ``[layers, 2, heads, count, dim]``."""
    generator = torch.Generator().manual_seed(count)
    rows = torch.randn(len(LAYERS), 2, HEADS, count, DIM, generator=generator).to(dtype)
    cache = SequenceCache(LAYERS, HEADS, DIM, 4 * BLOCK, dtype, kind=kind)
    extend(cache, rows)
    return cache, rows


def extend(cache: SequenceCache, rows: torch.Tensor) -> None:
    start, count = cache.length, rows.shape[3]
    cache.grow(start, start + count)
    for layer in range(LAYERS.start, LAYERS.end):
        cache.write(layer, start, *rows[layer - LAYERS.start])
    cache.length += count


def stored(cache: SequenceCache, first: int = 0) -> torch.Tensor:
    dense = DenseRows(cache, first, cache.length)
    return torch.stack([torch.stack(dense.layer(layer)) for layer in range(LAYERS.start, LAYERS.end)])


@pytest.mark.parametrize("count", [1, BLOCK, BLOCK + 1, LONG])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_stores_each_layer_by_its_number_in_the_model(count: int, dtype: torch.dtype) -> None:
    cache, rows = filled(count, dtype=dtype)
    assert torch.equal(stored(cache), rows)
    for first in {0, count // 2, count - 1}:
        assert torch.equal(stored(cache, first), rows[:, :, :, first:])


def test_blocks_come_as_positions_are_written() -> None:
    cache, rows = filled(BLOCK)
    one = 2 * 2 * HEADS * BLOCK * DIM * 4
    assert cache.size_bytes == SequenceCache.bytes_needed(LAYERS, HEADS, DIM, BLOCK, 4) == one
    extend(cache, rows[:, :, :, :1])
    assert cache.size_bytes == SequenceCache.bytes_needed(LAYERS, HEADS, DIM, BLOCK + 1, 4) == 2 * one
    assert torch.equal(stored(cache), torch.cat((rows, rows[:, :, :, :1]), 3))


def test_truncation_gives_back_all_but_one_spare_block() -> None:
    cache, rows = filled(LONG)
    four = cache.size_bytes
    cache.truncate(2 * BLOCK + 1)
    assert cache.size_bytes == four, "one is spare"
    cache.truncate(3)
    assert cache.size_bytes == four // 2
    cache.truncate(0)
    assert cache.size_bytes == four // 4
    extend(cache, rows)
    assert torch.equal(stored(cache), rows)


@pytest.mark.parametrize("kind", ["model", "int8"])
@pytest.mark.parametrize("length", [0, 32, BLOCK, LONG - 2])
@pytest.mark.parametrize("kept", [0, 5, 2 * BLOCK])
def test_a_copy_and_its_original_do_not_see_what_the_other_writes(kind: str, length: int, kept: int) -> None:
    cache, _ = filled(LONG, kind)
    before = stored(cache)
    copied = cache.copy(length, 4 * BLOCK)
    assert torch.equal(stored(copied), before[:, :, :, :length]) if length else copied.length == 0
    for one, other in ((copied, cache), (cache, copied)):
        untouched = stored(other) if other.length else None
        one.truncate(min(kept, one.length))
        extend(one, torch.full((len(LAYERS), 2, HEADS, BLOCK + 7, DIM), 3.0))
        if untouched is not None:
            assert torch.equal(stored(other), untouched)


def test_a_copy_shares_full_blocks() -> None:
    cache, _ = filled(LONG)
    copied = cache.copy(2 * BLOCK + 32, 4 * BLOCK)
    assert [a.data_ptr() == b.data_ptr() for a, b in zip(cache._blocks, copied._blocks, strict=False)] == [1, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_rounds_by_half_a_step_at_most(dtype: torch.dtype) -> None:
    cache, rows = filled(LONG, "int8", dtype)
    steps = rows.float().abs().amax(-1, keepdim=True) / 127
    slack = 1.001 if dtype == torch.float32 else 3.0  # a number of bfloat16 is itself as coarse as a step
    assert ((stored(cache).float() - rows.float()).abs() <= slack * steps / 2).all()
    assert cache.size_bytes == SequenceCache.bytes_needed(LAYERS, HEADS, DIM, LONG, dtype.itemsize, "int8")
    assert cache.size_bytes == 4 * 2 * 2 * HEADS * BLOCK * (DIM + 4)


def test_int8_of_nothing_is_nothing() -> None:
    cache = SequenceCache(LAYERS, HEADS, DIM, BLOCK, torch.float32, kind="int8")
    extend(cache, torch.zeros(len(LAYERS), 2, HEADS, 3, DIM))
    assert not stored(cache).any()


def test_heads_that_do_not_fit_int8_are_refused() -> None:
    with pytest.raises(BadRequest, match="heads of 6 numbers"):
        SequenceCache(LAYERS, 1, 6, 8, torch.float32, kind="int8")


def test_a_cache_only_grows_at_its_end_and_within_its_room() -> None:
    cache = SequenceCache(LAYERS, 1, 4, capacity=8, dtype=torch.float32)
    cache.check_room(0, 8)
    with pytest.raises(TooLong, match="9 positions exceed the 8"):
        cache.check_room(0, 9)
    with pytest.raises(Gap, match="starts at 1, the KV cache ends at 0"):
        cache.check_room(1, 1)
    cache.length = 6
    cache.truncate(4)
    assert cache.length == 4
    with pytest.raises(Gap):
        cache.truncate(5)
