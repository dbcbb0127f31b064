from __future__ import annotations

import pytest
import torch

from peers.graph_pass import FEW, MANY, GraphPass, graphs_for
from peers.kv_cache import SequenceCache
from swarm.types import LayerRange


@pytest.mark.parametrize(
    ("rows", "graphs"),
    [
        (1, [FEW]),
        (FEW, [FEW]),
        (FEW + 1, [FEW, FEW]),
        (2 * FEW, [FEW, FEW]),
        (2 * FEW + 1, [MANY]),
        (MANY, [MANY]),
        (MANY + 3, [MANY, FEW]),
        (2 * MANY + 2 * FEW + 1, [MANY, MANY, MANY]),
    ],
)
def test_rows_are_shared_out_among_graphs(rows: int, graphs: list[int]) -> None:
    assert list(graphs_for(rows)) == graphs


def test_a_cpu_has_no_graphs() -> None:
    like = SequenceCache(LayerRange(0, 2), 2, 16, 1, torch.float32)
    assert GraphPass.of(lambda given, positions, attending: given, None, like) is None
