from __future__ import annotations

import sys

import pytest

from peers.checkpoints import CheckpointLog
from swarm.errors import Internal


def filled(rows: bytes, forgotten: int = 0) -> CheckpointLog:
    log = CheckpointLog(2)
    log.append(0, rows)
    log.forget_before(forgotten)
    return log


def test_rows_that_are_forgotten_give_their_memory_back() -> None:
    log = CheckpointLog(1000)
    for position in range(1000):
        log.append(position, bytes(1000))
        log.forget_before(position - 9)
    assert (log.start, log.end) == (990, 1000)
    assert sys.getsizeof(log._buffer) < 20 * 1000
    log.forget_before(1000)
    assert sys.getsizeof(log._buffer) < 1000


def test_what_is_left_is_at_its_positions() -> None:
    log = filled(b"aabbccdd", forgotten=2)
    assert (log.start, log.end, log.read(2, 4), log.read(3, 4)) == (2, 4, b"ccdd", b"dd")
    with pytest.raises(Internal, match="rows 1:3 are not in a log of 2:4"):
        log.read(1, 3)
    log.forget_before(1)
    log.append(4, b"ee")
    assert (log.start, log.read(2, 5)) == (2, b"ccddee")
    log.truncate(3)
    log.append(3, b"xx")
    assert log.read(2, 4) == b"ccxx"
    copied = log.copy(3)
    copied.append(3, b"yy")
    assert (copied.start, copied.read(2, 4), log.read(2, 4)) == (2, b"ccyy", b"ccxx")


def test_a_log_cut_before_its_first_row_goes_on_from_there() -> None:
    log = filled(b"aabbccdd", forgotten=2)
    assert (log.copy(1).start, log.copy(1).end) == (1, 1)
    log.truncate(1)
    assert (log.start, log.end) == (1, 1)
    log.append(1, b"xxyy")
    assert log.read(1, 3) == b"xxyy"


def test_no_more_is_forgotten_than_there_is() -> None:
    log = filled(b"aabb", forgotten=9)
    assert (log.start, log.end, log.read(2, 2)) == (2, 2, b"")
    log.append(2, b"cc")
    assert log.read(2, 3) == b"cc"
