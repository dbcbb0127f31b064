"""The arithmetic of a probe. The rest: ``tests/sim/test_probe.py``."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
import torch

from peers.probe import ROWS, TOLERANCE, relative_error, rows_for
from swarm.types import LayerRange
from tests.sim.world import NUM_LAYERS, PROFILE

PROFILE_16 = replace(PROFILE, hidden_size=16)
INNER, LAST = LayerRange(1, 3), LayerRange(4, NUM_LAYERS)


def as_bytes(rows: torch.Tensor) -> bytes:
    return rows.to(torch.float32).numpy().tobytes()


def test_inputs_depend_on_layers_and_chance_and_have_the_models_shape() -> None:
    ids, hidden = rows_for(PROFILE_16, INNER, 1)
    assert ids is None
    assert hidden is not None
    assert len(hidden) == 4 * 16 * ROWS
    assert rows_for(PROFILE_16, INNER, 1) == (ids, hidden)
    assert rows_for(PROFILE_16, INNER, 2) != (ids, hidden)
    assert rows_for(PROFILE_16, LayerRange(2, 3), 1) != (ids, hidden)
    ids, hidden = rows_for(PROFILE_16, LayerRange(0, 3), 1)
    assert ids is not None
    assert hidden is None
    assert all(0 <= token < PROFILE_16.vocab_size for token in ids)


@pytest.mark.parametrize("size", [0.001, 1.0, 1000.0])
def test_the_error_is_that_of_what_the_layers_added_by_the_worst_row(size: float) -> None:
    _, given = rows_for(PROFILE_16, INNER, 1)
    assert given is not None
    hidden = torch.frombuffer(bytearray(given), dtype=torch.float32).view(ROWS, 16)
    added = size * torch.randn(ROWS, 16, generator=torch.Generator().manual_seed(3))
    expected = hidden + added
    wrong = expected.clone()
    wrong[2] += 0.1 * added[2]
    error = relative_error(as_bytes(wrong), as_bytes(expected), given, PROFILE_16, INNER)
    assert error == pytest.approx(0.1, rel=0.01)
    assert error > TOLERANCE["float32"]
    assert relative_error(as_bytes(expected), as_bytes(expected), given, PROFILE_16, INNER) == 0.0


def test_after_the_last_layer_the_logits_count_too() -> None:
    hidden, logits = torch.ones(ROWS, 16), torch.arange(1.0, PROFILE_16.vocab_size + 1)
    right = as_bytes(hidden) + as_bytes(logits)
    assert relative_error(right, right, b"", PROFILE_16, LAST) == 0.0
    assert relative_error(as_bytes(hidden) + as_bytes(1.5 * logits), right, b"", PROFILE_16, LAST) == pytest.approx(0.5)
    assert relative_error(as_bytes(2 * hidden) + as_bytes(logits), right, b"", PROFILE_16, LAST) == pytest.approx(1.0)


@pytest.mark.parametrize("found", [b"", b"\0" * 4, struct.pack("<f", float("nan")) * 16 * ROWS])
def test_too_few_numbers_and_no_numbers_are_infinitely_wrong(found: bytes) -> None:
    expected = as_bytes(torch.ones(ROWS, 16))
    assert relative_error(found, expected, as_bytes(torch.zeros(ROWS, 16)), PROFILE_16, INNER) == float("inf")
