"""How large the pieces of a prompt come to be, by what steps and pieces take."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from peers.piece_size import HOP_S, LEAST_ROWS, LEAST_SEEN, MOST_ROWS, PieceSize

START = 16
STEP_S = 0.005


def settled(size: PieceSize, piece_s: Callable[[int], float], step_s: float = STEP_S, mixed: bool = False) -> list[int]:
    """All sizes that it takes on while steps and pieces come in turn, or together."""
    sizes = [size.rows]
    for _ in range(100):
        size.note(1, 0, step_s)
        size.note(int(mixed), 1, piece_s(size.rows) + (step_s if mixed else 0.0))
        if size.rows != sizes[-1]:
            sizes.append(size.rows)
    return sizes


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(
    ("steps_of", "sizes"),
    [
        pytest.param({16: 1.7}, [16], id="float32 on a CPU"),
        pytest.param({16: 5.8, 8: 3.4}, [16, 8], id="4 bits on a CPU, with the least"),
        pytest.param({16: 1.0, 32: 1.05, 64: 1.1, 128: 1.8}, [16, 32, 64, 128], id="a card, with the most"),
        pytest.param({16: 1.0, 32: 2.1}, [16, 32], id="more than allowed would be twice that"),
        pytest.param({16: 1.0, 32: 2.9}, [16, 32, 16], id="a size that disappoints"),
    ],
)
def test_where_there_is_one_stage_a_piece_takes_as_long_as_two_steps(
    steps_of: dict[int, float], sizes: list[int], mixed: bool
) -> None:
    found = settled(PieceSize(START), lambda rows: steps_of[rows] * STEP_S, mixed=mixed)
    assert found[: len(sizes)] == sizes
    assert set(found) <= set(steps_of)
    assert LEAST_ROWS <= min(found) <= max(found) <= MOST_ROWS


@pytest.mark.parametrize(
    ("stages", "steps_of", "sizes"),
    [
        pytest.param(3, {16: 1.7, 32: 3.1}, [16, 32], id="float32 on a CPU, a third each"),
        pytest.param(3, {16: 5.8, 8: 3.4}, [16, 8], id="4 bits, a third each"),
        pytest.param(2, {16: 1.7, 32: 3.1}, [16, 32], id="float32, a half each"),
        pytest.param(10, {16: 5.8, 32: 11}, [16, 32], id="4 bits, a tenth each"),
    ],
)
def test_while_a_token_is_at_other_stages_there_is_time(
    stages: float, steps_of: dict[int, float], sizes: list[int]
) -> None:
    assert settled(PieceSize(START, stages), lambda rows: steps_of[rows] * STEP_S) == sizes


def test_it_follows_steps_that_become_slower_or_faster() -> None:
    size = PieceSize(START)
    assert settled(size, lambda rows: rows * 0.001, step_s=0.1)[-1] == MOST_ROWS
    assert settled(size, lambda rows: rows * 0.001, step_s=0.002)[-1] == LEAST_ROWS


def test_before_a_step_was_measured_nothing_is_known() -> None:
    size = PieceSize(START)
    for _ in range(10):
        size.note(0, 1, 1.0)
    assert size.rows == START


def test_one_slow_piece_is_a_hiccup() -> None:
    size = PieceSize(START)
    size.note(1, 0, STEP_S)
    for _ in range(10 * LEAST_SEEN):
        size.note(0, 1, 0.8 * 2 * (STEP_S + HOP_S))
    size.note(0, 1, 1.5 * 2 * (STEP_S + HOP_S))
    assert size.rows == START


def test_several_pieces_in_one_pass_count_each() -> None:
    size = PieceSize(START)
    for _ in range(50):
        size.note(1, 0, STEP_S)
        size.note(0, 4, 4 * 1.7 * STEP_S)
    assert size.rows == START
