"""The rules of a stage for frames that wait."""

from __future__ import annotations

import pytest

from peers.stage_input import Work
from swarm.errors import ProtocolError
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


def test_tokens_that_wait_are_run_in_one_pass() -> None:
    """One frame each, they were more than may wait for a successor that warms up and is slower than the old route."""
    made = stage(last=False)
    made.expected = HAVE
    for row in range(20):
        work = Work(1, HAVE + row, 1, hidden=bytes([row, row]), sender=BEFORE, sequence=row, hops=(bytes([row]),))
        assert made.accept(work, 3, 8)
    assert [(work.start - HAVE, work.rows, work.sequence, work.hops) for work in made.inbox] == [
        (0, 8, 7, (b"\x07",)),
        (8, 8, 15, (b"\x0f",)),
        (16, 4, 19, (b"\x13",)),
    ]
    assert b"".join(work.hidden or b"" for work in made.inbox) == bytes(row for row in range(20) for _ in range(2))
    assert made.expected == HAVE + 20
    counted = Work(1, HAVE + 20, 1, hidden=b"ab", sender=BEFORE, sequence=20, want_ack=True)
    with pytest.raises(ProtocolError, match="3 frames wait"):
        made.accept(counted, 3, 8)
    guess = Work(1, HAVE + 19, 3, hidden=b"abcdef", sender=BEFORE, sequence=20, draft=1, draft_start=HAVE + 20)
    assert made.accept(guess, 3, 8), "what it takes back waits no longer"
    newest = made.inbox[-1]
    assert (newest.start, newest.rows, newest.draft, newest.draft_start) == (HAVE + 16, 6, 1, HAVE + 20)
