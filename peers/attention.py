"""Ragged attention: the new rows of many sessions in one call, each against its own KV cache.

Registered with ``transformers.AttentionInterface``, so that a model's own code computes q, k and v for all rows of
all sessions at once, concatenated along the sequence axis, and only this function knows where one session ends and
the next begins. This is continuous batching as in Orca (Yu et al., OSDI 2022), "selective batching". No mask
function is registered on purpose: for such an implementation transformers builds no mask, and it would be wrong
for concatenated sessions anyhow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from peers.attention_kernel import AttentionKernel, Rows, attention_kernel, table
from peers.kv_cache import DenseRows, SequenceCache
from swarm.errors import UnsupportedModel

IMPLEMENTATION: Final = "swarm"


@dataclass(slots=True)
class Span:
    """Rows ``offset .. offset + count - 1`` of a batch belong to one session, at positions ``start ..``."""

    cache: SequenceCache
    start: int
    count: int
    offset: int
    _masks: dict[int | None, torch.Tensor | None] = field(default_factory=dict)
    _dense: dict[int, DenseRows] = field(default_factory=dict)

    def mask(self, window: int | None, like: torch.Tensor) -> torch.Tensor | None:
        """What to add to scores ``[count, keys]`` for a chunk; None where the plain causal triangle is right.

        Built once per step and kind of layer, and shared by all layers of that kind: at long contexts it is as
        large as the scores of one head.
        """
        if window not in self._masks:
            first = self.first_key(window)
            end = self.start + self.count
            if first == 0 and self.start == 0 and (window is None or end <= window):
                self._masks[window] = None
            else:
                rows = torch.arange(self.start, end, device=like.device)[:, None]
                keys = torch.arange(first, end, device=like.device)[None, :]
                hidden = keys > rows
                if window is not None:
                    hidden |= keys <= rows - window
                mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
                self._masks[window] = mask.masked_fill_(hidden, float("-inf"))
        return self._masks[window]

    def dense(self, window: int | None) -> DenseRows:
        """What its rows attend to; of layers of a kind, one after the other, in the same memory."""
        first = self.first_key(window)
        if first not in self._dense:
            self._dense[first] = DenseRows(self.cache, first, self.start + self.count)
        return self._dense[first]

    def first_key(self, window: int | None) -> int:
        """The earliest position that the first row still sees; a window counts the row itself."""
        return 0 if window is None else max(0, self.start - window + 1)


class Spans(tuple[Span, ...]):
    """Those of a batch. All of them are one call of the kernel, if there is one."""

    @property
    def positions(self) -> list[int]:
        """Of all rows, in their order."""
        return [position for span in self for position in range(span.start, span.start + span.count)]

    @cached_property
    def table(self) -> Rows:
        return table(self)

    def attend(
        self, layer: int, window: int | None, scale: float, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """``query`` is ``[heads, rows, head_dim]``, ``key`` and ``value`` ``[kv_heads, rows, head_dim]``; returns
        ``[rows, heads, head_dim]``. Keys and values are written to the caches first."""
        result = query.new_empty(query.shape[1], query.shape[0], query.shape[2])
        kernel = attention_kernel() if AttentionKernel.takes(query, key, value) else None
        if kernel is not None:
            kernel.attend(self.table, layer, window, scale, query, key, value, result)
            return result
        for span in self:
            rows = slice(span.offset, span.offset + span.count)
            result[rows] = _attend(span, layer, window, scale, query[None, :, rows], key[:, rows], value[:, rows])
        return result


class Attending(Protocol):
    """The rows of a pass, which know their sessions' caches: :class:`Spans`, or what stands for them on a card."""

    def attend(
        self, layer: int, window: int | None, scale: float, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """See :meth:`Spans.attend`."""


def spans_of(caches: Sequence[SequenceCache], starts: Sequence[int], counts: Sequence[int]) -> Spans:
    """The spans of a batch whose sessions' rows follow each other in this order; the caches have room for them."""
    spans = []
    offset = 0
    for cache, start, count in zip(caches, starts, counts, strict=True):
        cache.grow(start, start + count)
        spans.append(Span(cache, start, count, offset))
        offset += count
    return Spans(spans)


def swarm_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    spans: Attending | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Writes the new keys and values into the sessions' caches and attends, each session to its own.

    ``query`` is ``[1, heads, rows, head_dim]``, ``key`` and ``value`` ``[1, kv_heads, rows, head_dim]``; returns
    ``[1, rows, heads, head_dim]``. ``spans`` travels through the model's ``**kwargs``.
    """
    if spans is None:
        raise UnsupportedModel(f"{type(module).__name__} does not hand keyword arguments on to its attention")
    if softcap is not None or s_aux is not None:
        raise UnsupportedModel(f"{type(module).__name__} caps its scores or has attention sinks")
    layer: int = module.layer_idx  # type: ignore[assignment]
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    return spans.attend(layer, sliding_window, scale, query[0], key[0], value[0])[None], None


def _attend(
    span: Span,
    layer: int,
    window: int | None,
    scale: float,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> torch.Tensor:
    """One session: ``query`` is ``[1, heads, rows, head_dim]``, ``key`` and ``value`` ``[kv_heads, rows, head_dim]``;
    returns ``[rows, heads, head_dim]``."""
    heads, count, head_dim = query.shape[1:]
    span.cache.write(layer, span.start, key, value)
    keys, values = (rows[None] for rows in span.dense(window).layer(layer))
    if count == 1:
        # The query heads that share a kv head become the rows of one small matrix: nothing is repeated.
        grouped = query.reshape(1, keys.shape[1], -1, head_dim)
        return scaled_dot_product_attention(grouped, keys, values, scale=scale).reshape(1, heads, head_dim)
    mask, gqa = span.mask(window, query), keys.shape[1] != heads
    output = scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, scale=scale, is_causal=mask is None, enable_gqa=gqa
    )
    return output[0].transpose(0, 1)


AttentionInterface.register(IMPLEMENTATION, swarm_attention)
