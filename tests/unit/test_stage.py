"""The rules of a stage for frames that wait."""

from __future__ import annotations

import pytest

from peers.stage_input import Work
from tests.unit.test_stage_drafts import BEFORE, KNOWN, stage

HAVE = KNOWN - 1


@pytest.mark.parametrize(
    ("frames", "left"),
    [
        ([(0, 4), (4, 2)], [(0, 4), (4, 2)]),
        ([(0, 4), (4, 2), (5, 3)], [(0, 4), (4, 1), (5, 3)]),
        ([(0, 4), (4, 2), (4, 1)], [(0, 4), (4, 1)]),
        ([(0, 4), (4, 2), (1, 1), (2, 8)], [(0, 1), (1, 1), (2, 8)]),
        ([(0, 4), (4, 2), (-3, 5)], [(-3, 5)]),
    ],
)
def test_no_position_waits_twice(frames: list[tuple[int, int]], left: list[tuple[int, int]]) -> None:
    """What the next frame takes back is not run before it, and acknowledged with it. Starts count from the end."""
    made = stage(last=False)
    made.expected = HAVE
    for sequence, (start, rows) in enumerate(frames):
        data = b"".join(bytes([row, sequence]) for row in range(rows))
        work = Work(1, HAVE + start, rows, hidden=data, sender=BEFORE, sequence=sequence, want_ack=not sequence)
        assert made.accept(work, 64)
    assert [(work.start - HAVE, work.rows) for work in made.inbox] == left
    assert made.expected == HAVE + sum(frames[-1])
    assert all(work.hidden is not None and len(work.hidden) == 2 * work.rows for work in made.inbox)
    assert made.inbox[0].want_ack
