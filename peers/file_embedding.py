"""The first stage's embedding without its table: rows are read from the checkpoint as tokens need them.

A step needs one row per token, of a table that is a quarter of a small model in float32. Reading a row costs
microseconds while the file is in the page cache, which the system shares between peers and takes back when it must.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from peers.weights import TensorSource


class FileEmbedding(nn.Module):
    """Stands in for a family's embedding module, whose own code still does what it does to the rows."""

    def __init__(self, embedding: nn.Module, source: TensorSource, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        embedding.padding_idx = None  # type: ignore[assignment]  # tells which row has no gradient, no more
        # Not a submodule: its weight is never read as a whole.
        self._embedding = (embedding,)
        self._source = source
        self._name = name
        self._dtype = dtype

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """``[1, rows]`` -> ``[1, rows, hidden]``."""
        (embedding,) = self._embedding
        rows = self._source.rows(self._name, token_ids.flatten().tolist(), self._dtype)
        if type(embedding) is nn.Embedding:  # which does no more than look rows up
            return rows.view(*token_ids.shape, -1)
        embedding._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
        return embedding(torch.arange(len(rows)).view(token_ids.shape))  # type: ignore[no-any-return]
