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
from typing import Any, Final

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from peers.kv_cache import SequenceCache
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

    def first_key(self, window: int | None) -> int:
        """The earliest position that the first row still sees; a window counts the row itself."""
        return 0 if window is None else max(0, self.start - window + 1)


def spans_of(caches: Sequence[SequenceCache], starts: Sequence[int], counts: Sequence[int]) -> list[Span]:
    """The spans of a batch whose sessions' rows follow each other in this order."""
    spans = []
    offset = 0
    for cache, start, count in zip(caches, starts, counts, strict=True):
        spans.append(Span(cache, start, count, offset))
        offset += count
    return spans


def swarm_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    spans: Sequence[Span] | None = None,
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
    heads, head_dim = query.shape[1], query.shape[3]
    new_keys, new_values, queries = key[0], value[0], query[0]
    outputs = []
    for span in spans:
        start, count, offset = span.start, span.count, span.offset
        end = start + count
        keys, values = span.cache.layer(layer)
        keys[:, start:end] = new_keys[:, offset : offset + count]
        values[:, start:end] = new_values[:, offset : offset + count]
        first = span.first_key(sliding_window)
        keys, values = keys[None, :, first:end], values[None, :, first:end]
        if count == 1:
            # The query heads that share a kv head become the rows of one small matrix: nothing is repeated.
            grouped = queries[:, offset].reshape(1, keys.shape[1], -1, head_dim)
            output = scaled_dot_product_attention(grouped, keys, values, scale=scaling)
            outputs.append(output.reshape(1, heads, head_dim))
        else:
            mask = span.mask(sliding_window, query)
            output = scaled_dot_product_attention(
                queries[None, :, offset : offset + count],
                keys,
                values,
                attn_mask=mask,
                scale=scaling,
                is_causal=mask is None,
                enable_gqa=keys.shape[1] != heads,
            )
            outputs.append(output[0].transpose(0, 1))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None], None


AttentionInterface.register(IMPLEMENTATION, swarm_attention)
