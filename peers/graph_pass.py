"""Rows through all layers of a shard on an NVIDIA card, as CUDA graphs.

A step is a few hundred small kernels, and starting them from Python takes longer than they do. A graph is started at
once, but all in it is fixed: it takes so many rows, of which some may be nobody's, each at a position and with a cache
of its own. There is one for few rows, as many as a card computes in the time that it waits for the weights, and one for
prompts. A row gets the same bits from both, whichever rows share the pass: a stage that replays a session's rows has
what the lost one had, on the same kind of card.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Final, Self

import torch

from peers.attention import Attending, Spans
from peers.card_linear import card_works
from peers.kv_cache import BLOCK, DenseRows, SequenceCache
from swarm.types import LayerRange

if TYPE_CHECKING:
    from peers.paged_attention import PagedRows

logger = logging.getLogger(__name__)

FEW, MANY = 32, 128
"""Rows of the graphs; the large one takes a chunk of a prompt as owners send it."""
_WARM_UPS: Final = 2
"""Before kernels can be recorded they are to be compiled, and libraries to have their memory."""
NOBODY: Final = -1
"""The position of a row that is nobody's."""

Layers = Callable[[torch.Tensor, torch.Tensor, Attending], torch.Tensor]
"""Token ids ``[1, rows]`` or hidden states ``[1, rows, hidden]``, positions ``[1, rows]``, and what attends -> hidden
states ``[1, rows, hidden]``."""


class GraphPass:
    """Gives what ``layers`` gives, to within the dtype's rounding. For one thread."""

    def __init__(self, layers: Layers, width: int | None, like: SequenceCache) -> None:
        """``width`` is that of hidden states, None for token ids; the caches of all rows are ``like`` that one."""
        self._like = like
        self._graphs = {rows: _Graph(layers, rows, width, like) for rows in (FEW, MANY)}

    @classmethod
    def of(cls, layers: Layers, width: int | None, like: SequenceCache) -> Self | None:
        """None, and a line in the log, where the card or its driver can't."""
        if not card_works(like.device) or not _attention_works(like.device, like.dtype):
            return None
        try:
            return cls(layers, width, like)
        except Exception as error:  # of a compiler and a driver that know many
            logger.warning("no CUDA graph for layers %s, steps will be slower: %s", like.layers, error)
            return None

    def takes(self, spans: Spans) -> bool:
        """Whether their caches are as they should be."""
        like = self._like
        return all((span.cache.layers, span.cache.kind) == (like.layers, like.kind) for span in spans)

    @torch.inference_mode()
    def run(self, given: torch.Tensor, spans: Spans) -> torch.Tensor:
        """Token ids ``[rows]`` or hidden states ``[rows, hidden]`` -> hidden states ``[rows, hidden]``, on the card."""
        tables = [table for span in spans for table in [span.cache.blocks_address] * span.count]
        places = torch.tensor([tables, spans.positions], device=self._like.device)
        given = given.to(self._like.device)
        parts, first = [], 0
        for rows in graphs_for(len(tables)):
            parts.append(self._graphs[rows].run(given[first : first + rows], places[:, first : first + rows]))
            first += rows
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def graphs_for(rows: int) -> Iterator[int]:
    """Sizes of the graphs that together take so many rows. The large one takes longer than two small ones."""
    while rows > 0:
        size = FEW if rows <= 2 * FEW else MANY
        yield size
        rows -= size


class _Graph:
    def __init__(self, layers: Layers, rows: int, width: int | None, like: SequenceCache) -> None:
        from peers.paged_attention import PagedRows

        device = like.device
        shape, dtype = ((1, rows), torch.int64) if width is None else ((1, rows, width), like.dtype)
        self._given = torch.zeros(shape, dtype=dtype, device=device)
        self._places = torch.full((2, rows), NOBODY, device=device)
        attending = PagedRows(self._places[0], self._places[1], like.layers.start)
        self._graph = torch.cuda.CUDAGraph()
        aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.inference_mode():
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UPS):
                    layers(self._given, self._places[1:], attending)
            torch.cuda.current_stream(device).wait_stream(aside)
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._result = layers(self._given, self._places[1:], attending)[0]

    def run(self, given: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        rows = len(given)
        self._given[0, :rows] = given
        self._places[:, :rows] = places
        self._places[1, rows:] = NOBODY
        self._graph.replay()
        return self._result[:rows].clone()


@cache
def _attention_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build and card have the kernels: tried once, on a small pass."""
    try:
        from peers.paged_attention import PagedRows

        return _right(PagedRows, device, dtype)
    except Exception as error:  # of a compiler that knows many
        logger.warning("no kernels for attention on %s, steps will be slower: %s", device, error)
        return False


def _right(kind: type[PagedRows], device: torch.device, dtype: torch.dtype) -> bool:
    seen, heads, kv_heads, dim = BLOCK + 19, 6, 2, 48
    generator = torch.Generator().manual_seed(0)
    past = torch.randn(2, kv_heads, seen, dim, generator=generator).to(device, dtype)
    query = torch.randn(heads, seen, dim, generator=generator).to(device, dtype)
    cache = SequenceCache(LayerRange(0, 1), kv_heads, dim, seen, dtype, device)
    cache.grow(0, seen)
    rows = kind(torch.full((seen,), cache.blocks_address, device=device), torch.arange(seen, device=device), 0)
    found = rows.attend(0, None, 0.2, query, past[0], past[1])
    if not torch.equal(torch.stack(DenseRows(cache, 0, seen).layer(0)), past):
        return False
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query[None], past[:1], past[1:], is_causal=True, scale=0.2, enable_gqa=True
    )
    close = 1e-4 if dtype == torch.float32 else 0.05
    return torch.allclose(found.float(), wanted[0].transpose(0, 1).float(), atol=close)
