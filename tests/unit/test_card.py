"""What an NVIDIA card runs: whole passes where there is one; elsewhere its kernels by Triton's interpreter, slowly."""

# ruff: noqa: E402  (what is imported depends on the card)
from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

HAS_CARD = torch.cuda.is_available()
if not HAS_CARD:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton", reason="triton comes with torch for NVIDIA cards")

from peers.card_products import CardMatrix
from peers.families import FAMILIES
from peers.graph_pass import FEW, MANY
from peers.kv_cache import BLOCK, DenseRows, SequenceCache
from peers.paged_attention import PagedRows
from peers.shard import Shard, Step
from peers.weights.blocks import BlockKind, to_blocks
from swarm.types import LayerRange
from tests.reference import ModelSource, profile_of
from tests.unit.test_attention import expected
from tests.unit.test_shard import LAYERS, Chain, load, logits_of, ragged, run, texts, whole

DEVICE = "cuda" if HAS_CARD else "cpu"
# The interpreter multiplies matrices in float32 only.
DTYPES = [torch.float32, torch.bfloat16] if HAS_CARD else [torch.float32]
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
on_a_card = pytest.mark.skipif(not HAS_CARD, reason="no NVIDIA card here")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 4, BLOCK + 10])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 16), (6, 2, 24), (9, 3, 64), (64, 2, 128)])
def test_each_row_attends_to_its_own_past(
    heads: int, kv_heads: int, dim: int, window: int | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layers, layer = LayerRange(6, 9), 7
    shapes = [(0, 5), (3, 1), (BLOCK, 1), (BLOCK - 1, 1), (2 * BLOCK - 2, 4), (9 * BLOCK + 3, 2)]
    caches, history = [], []
    for start, count in shapes:
        cache = SequenceCache(layers, kv_heads, dim, 10 * BLOCK, dtype, DEVICE)
        _as_on_a_card(cache)
        past = torch.randn(2, kv_heads, start + count, dim, device=DEVICE).to(dtype)
        cache.grow(0, start + count)
        cache.write(layer, 0, past[0, :, :start], past[1, :, :start])
        caches.append(cache)
        history.append(past)
    tables = [cache.blocks_address for cache, (_, count) in zip(caches, shapes, strict=True) for _ in range(count)]
    positions = [position for start, count in shapes for position in range(start, start + count)]
    new = [past[:, :, start:] for past, (start, _) in zip(history, shapes, strict=True)]
    key, value = torch.cat(new, 2)
    query = torch.randn(len(positions), heads, dim, device=DEVICE).to(dtype).transpose(0, 1)
    rows = PagedRows(torch.tensor(tables, device=DEVICE), torch.tensor(positions, device=DEVICE), layers.start)
    found = rows.attend(layer, window, 0.3, query, key, value)
    assert found.shape == (len(positions), heads, dim)
    first = 0
    for cache, past, (start, count) in zip(caches, history, shapes, strict=True):
        assert torch.equal(torch.stack(DenseRows(cache, 0, start + count).layer(layer)), past)
        own = slice(first, first + count)
        wanted = expected(query[:, own].float(), past[0].float(), past[1].float(), start, window, 0.3)
        torch.testing.assert_close(found[own].transpose(0, 1).float(), wanted, atol=CLOSE[dtype], rtol=1e-2)
        first += count


def _as_on_a_card(cache: SequenceCache) -> None:
    """Keys as they are; on a CPU they would be turned."""
    cache._turned = False


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs", "rows"), [(70, 96, 1), (40, 576, 17), (64, 32, 40)])
@pytest.mark.parametrize("kind", BlockKind)
def test_products_from_blocks(kind: BlockKind, outputs: int, inputs: int, rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    matrix = to_blocks(torch.randn(outputs, inputs), kind).to(torch.device(DEVICE))
    given = torch.randn(rows, inputs, device=DEVICE).to(dtype)
    found = CardMatrix(matrix).product(given)
    wanted = given.double() @ matrix.expand().to(dtype).double().T
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("kind", BlockKind)
def test_a_row_has_the_same_products_in_any_company(kind: BlockKind) -> None:
    torch.manual_seed(0)
    matrix = CardMatrix(to_blocks(torch.randn(96, 1600), kind).to(torch.device(DEVICE)))
    for dtype in DTYPES:
        given = torch.randn(140, 1600, device=DEVICE).to(dtype)
        together = matrix.product(given)
        assert torch.equal(matrix.product(given[:32]), together[:32])
        for row in (0, 13, 139):
            assert torch.equal(matrix.product(given[row : row + 1])[0], together[row])


@on_a_card
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_shards_on_a_card_are_the_whole_model(family: str) -> None:
    model = whole(family)
    shards = [load(model, LayerRange(*pair), device=DEVICE) for pair in ((0, 2), (2, 6))]
    chain = Chain(shards, sessions=3)
    ids = texts(3, 50)
    got = ragged(chain, ids, ((7, 1, 3), (1, 9, 34), (41, 39, 12), (1, 1, 1)))
    assert all(view._graph is not None for shard in shards for view in shard._views.values())
    for text, logits in zip(ids, got, strict=True):
        torch.testing.assert_close(logits, logits_of(model, text), atol=1e-4, rtol=0)


@on_a_card
@pytest.mark.parametrize(("dtype", "weights"), [("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "int8")])
def test_a_row_gets_the_same_bits_in_any_company_and_chunks(dtype: str, weights: str) -> None:
    shard = _on_card(dtype, weights)
    ids = texts(5, MANY)
    together = shard.new_cache(shard.layers, MANY)
    (whole_text,) = run(shard, Step(shard.layers, together, 0, ids[0], want_hidden=True))
    alone, others = shard.new_cache(shard.layers, MANY), [shard.new_cache(shard.layers, MANY) for _ in ids[1:]]
    rows, at = [], 0
    for count in (1, 5, 1, FEW, 1, 66, 1, MANY - FEW - 75):
        mine = Step(shard.layers, alone, at, ids[0][at : at + count], want_hidden=True)
        theirs = [
            Step(shard.layers, cache, at, text[at : at + count]) for cache, text in zip(others, ids[1:], strict=True)
        ]
        rows.append(run(shard, *theirs[:2], mine, *theirs[2:])[2].hidden)
        at += count
    assert torch.equal(torch.cat(rows), whole_text.hidden)


@on_a_card
def test_sessions_in_int8_are_not_the_graphs() -> None:
    shard = _on_card("float32", "auto")
    ids = texts(1, 20)[0]
    logits = []
    for kind in ("model", "int8"):
        cache = shard.new_cache(shard.layers, 20, kind)
        (output,) = run(shard, Step(shard.layers, cache, 0, ids, head_rows=20))
        logits.append(output.logits)
    torch.testing.assert_close(logits[1], logits[0], atol=0.2, rtol=0)


def _on_card(dtype: str, weights: str) -> Shard:
    model = whole("qwen3")
    profile = replace(profile_of(model.config), weights=weights)
    options = {"dtype": getattr(torch, dtype), "device": DEVICE}
    return Shard.load(profile, model.config.to_dict(), ModelSource(model), LayerRange(0, LAYERS), **options)
