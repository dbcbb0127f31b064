from __future__ import annotations

import pytest
import torch
from torch import nn

from peers import attention
from peers.attention import Span, spans_of, swarm_attention
from peers.attention_kernel import attention_kernel
from peers.kv_cache import BLOCK, DenseRows, SequenceCache
from swarm.errors import UnsupportedModel
from swarm.types import LayerRange

LAYER = 7
LAYERS = LayerRange(6, 9)
HEAD_DIM = 8


class Module(nn.Module):
    layer_idx = LAYER


def expected(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, window: int | None, scaling: float
) -> torch.Tensor:
    """Attention by its definition, for one session: ``[heads, rows, head_dim]`` against all keys so far."""
    heads, rows, _ = query.shape
    group = heads // keys.shape[0]
    out = torch.empty_like(query)
    for head in range(heads):
        for row in range(rows):
            position = start + row
            first = 0 if window is None else max(0, position - window + 1)
            seen = keys[head // group, first : position + 1]
            weights = torch.softmax(seen @ query[head, row] * scaling, 0)
            out[head, row] = weights @ values[head // group, first : position + 1]
    return out


@pytest.mark.parametrize("kind", ["model", "int8"])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("window", [None, 1, 4, BLOCK + 10])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 8), (6, 2, 24), (3, 1, 64)])
def test_each_session_attends_to_its_own_past(
    heads: int, kv_heads: int, dim: int, window: int | None, compiled: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(attention, "attention_kernel", lambda: None)
    elif attention_kernel() is None:
        pytest.skip("no C compiler here")
    torch.manual_seed(0)
    shapes = [(0, 5), (3, 1), (BLOCK, 1), (BLOCK - 1, 1), (2 * BLOCK - 2, 4), (1, 2), (BLOCK - 3, 11), (0, 3 * BLOCK)]
    caches, history = [], []
    for start, count in shapes:
        cache = SequenceCache(LAYERS, kv_heads, dim, 4 * BLOCK, torch.float32, kind=kind)
        past = torch.randn(2, kv_heads, start + count, dim)
        cache.grow(0, start)
        cache.write(LAYER, 0, past[0, :, :start], past[1, :, :start])
        caches.append(cache)
        history.append(past)
    starts, counts = [start for start, _ in shapes], [count for _, count in shapes]
    key = torch.cat([past[0, :, start:] for past, start in zip(history, starts, strict=True)], dim=1)[None]
    value = torch.cat([past[1, :, start:] for past, start in zip(history, starts, strict=True)], dim=1)[None]
    query = torch.randn(1, sum(counts), heads, dim).transpose(1, 2)
    spans = spans_of(caches, starts, counts)
    out, weights = swarm_attention(Module(), query, key, value, None, scaling=0.3, spans=spans, sliding_window=window)
    assert weights is None
    assert out.shape == (1, sum(counts), heads, dim)
    for span, past in zip(spans, history, strict=True):
        rows = slice(span.offset, span.offset + span.count)
        stored = torch.stack(DenseRows(span.cache, 0, past.shape[2]).layer(LAYER))
        if kind == "model":
            assert torch.equal(stored, past)
        else:
            torch.testing.assert_close(stored, past, atol=float(past.abs().max()) / 127 / 2 * 1.001, rtol=0)
        wanted = expected(query[0, :, rows], stored[0], stored[1], span.start, window, 0.3)
        torch.testing.assert_close(out[0, rows].transpose(0, 1), wanted, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("compiled", [True, False])
def test_rows_in_int8_do_not_depend_on_how_they_were_cut(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(attention, "attention_kernel", lambda: None)
    torch.manual_seed(0)
    rows, dim = BLOCK + 20, 16
    query, key, value = torch.randn(3, 1, 2, rows, dim)
    results, caches = [], []
    for piece in (1, 3, 11, rows):
        cache = SequenceCache(LAYERS, 2, dim, rows, torch.float32, kind="int8")
        parts = []
        for start in range(0, rows, piece):
            new = slice(start, min(start + piece, rows))
            spans = spans_of([cache], [start], [new.stop - start])
            chunk = query[:, :, new], key[:, :, new], value[:, :, new]
            parts.append(swarm_attention(Module(), *chunk, None, spans=spans)[0][0])
            cache.length = new.stop
        results.append(torch.cat(parts))
        caches.append(torch.stack(DenseRows(cache, 0, rows).layer(LAYER)))
    for result, stored in zip(results[1:], caches[1:], strict=True):
        assert torch.equal(stored, caches[0]), "kernel and torch round alike"
        torch.testing.assert_close(result, results[0], atol=5e-6, rtol=1e-5)


def test_a_mask_is_built_once_for_all_layers_of_a_kind() -> None:
    span = Span(SequenceCache(LAYERS, 1, HEAD_DIM, 16, torch.float32), start=4, count=3, offset=0)
    like = torch.zeros(1)
    assert span.mask(None, like) is span.mask(None, like)
    assert span.mask(5, like) is span.mask(5, like)
    assert span.mask(5, like) is not span.mask(None, like)


def test_a_first_chunk_needs_no_mask() -> None:
    span = Span(SequenceCache(LAYERS, 1, HEAD_DIM, 16, torch.float32), start=0, count=5, offset=0)
    assert span.mask(None, torch.zeros(1)) is None
    assert span.mask(5, torch.zeros(1)) is None
    assert span.mask(4, torch.zeros(1)) is not None


@pytest.mark.parametrize("extra", [{"softcap": 30.0}, {"s_aux": torch.zeros(2)}, {"spans": None}])
def test_what_it_would_compute_wrongly_is_refused(extra: dict[str, object]) -> None:
    rows = torch.zeros(1, 2, 1, HEAD_DIM)
    options: dict[str, object] = {"spans": [], **extra}
    with pytest.raises(UnsupportedModel, match="Module"):
        swarm_attention(Module(), rows, rows, rows, None, **options)  # type: ignore[arg-type]
