"""What the compute thread runs next, by a table of what waits and when."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from peers.batching import DECODING_S, MOST_PIECES, PATIENCE, RETURN_S, Batching, Waiting
from peers.executor import StepReply, StepRequest
from swarm.errors import Internal
from swarm.protocol import timing_to_wire
from swarm.types import HopTiming, LayerRange, PeerId

ALL, BACK = LayerRange(0, 2), LayerRange(1, 2)
PIECE, MOST = 20, 64


class Cache:
    length = 0

    def truncate(self, length: int) -> None:
        raise AssertionError("nothing is run here")


class Thread:
    """Takes batches, and keeps what is not yet run of a prompt waiting."""

    def __init__(self) -> None:
        self.batching = Batching(MOST, PIECE)
        self.caches: list[Cache] = []  # as long as they live, no two have the same id

    def add(
        self,
        rows: int,
        now: float = 0.0,
        layers: LayerRange = ALL,
        owner: str = "",
        round_: Sequence[bytes] = (),
        cache: Cache | None = None,
        more: bool = False,
    ) -> None:
        ids = [1] * rows if layers.start == 0 else None
        self.caches.append(cache or Cache())
        step = StepRequest(layers, self.caches[-1], 0, rows, ids, None, owner=owner, round=round_, more=more)
        self.batching.add(Waiting(step, lambda reply: None, now))

    def rows(self, now: float) -> list[int]:
        batch = self.batching.take(now)
        rows = [waiting.piece.rows for waiting in batch]
        for waiting in batch:
            if waiting.take(StepReply(b"", (), b"", 0.0, 0.0, 1), now) is None:
                self.batching.add(waiting)
        return rows

    def decode(self, at: float) -> None:
        self.add(1, at)
        assert 1 in self.rows(at)

    def decode_often(self) -> float:
        """A step each 0.1 s; when the last of them was."""
        times = [0.1 * i for i in range(30)]
        for at in times:
            self.decode(at)
        return times[-1]


def ring(*compute_s: float, link_s: float = 0.0) -> list[bytes]:
    """What stages with these times say."""
    timings = [HopTiming(PeerId(str(place)), BACK, 0.0, time_s, 1, link_s) for place, time_s in enumerate(compute_s)]
    return [timing_to_wire(timing) for timing in timings]


@pytest.fixture
def thread() -> Thread:
    return Thread()


def test_a_prompt_runs_in_large_chunks_when_nobody_decodes(thread: Thread) -> None:
    thread.add(150)
    assert [thread.rows(0.1 * i) for i in range(4)] == [[MOST], [MOST], [22], []]
    assert thread.batching.hold_s(1.0) is None


def test_where_decode_steps_always_wait_every_other_pass_is_theirs(thread: Thread) -> None:
    thread.add(50)
    passes = []
    for i in range(6):
        thread.add(1, 0.01 * i)
        thread.add(1, 0.01 * i)
        passes.append(thread.rows(0.01 * i))
    assert passes == [[1, 1], [1, 1, PIECE], [1, 1], [1, 1, PIECE], [1, 1], [1, 1, 10]]


EQUAL, ONE_IS_SLOW, ALONE = ring(0.01, 0.01, 0.01), ring(0.001, 0.001, 0.01), ring(0.03)


@pytest.mark.parametrize(
    ("sessions", "round_", "passes"),
    [
        (16, EQUAL, [6, 5, 5]),
        (9, EQUAL, [5, 4]),
        (7, EQUAL, [7]),
        (16, ONE_IS_SLOW, [16]),
        (16, ALONE, [16]),
        (16, ring(0.01, 0.01, link_s=0.1), [4, 4, 4, 4]),
        (16, [], [16]),
        (16, [b"nonsense"], [16]),
    ],
)
def test_sessions_that_come_together_leave_some_for_the_other_stages(
    thread: Thread, sessions: int, round_: list[bytes], passes: list[int]
) -> None:
    for _ in range(sessions):
        thread.add(1, round_=round_)
    assert [len(thread.rows(0.001 * i)) for i in range(len(passes))] == passes


def test_a_group_that_goes_round_is_left_as_it_is(thread: Thread) -> None:
    caches = [Cache() for _ in range(18)]
    groups = [caches[:6], caches[6:12], caches[12:]]
    for turn in range(30):
        for cache in groups[turn % 3]:
            thread.add(1, 0.01 * turn, round_=EQUAL, cache=cache)
        assert thread.rows(0.01 * turn) == [1] * 6


def add_all(thread: Thread, caches: list[Cache], now: float) -> None:
    for cache in caches:
        thread.add(1, now, round_=ALONE, cache=cache)


def test_two_groups_at_the_only_stage_become_one(thread: Thread) -> None:
    caches = [Cache() for _ in range(16)]
    add_all(thread, caches[:5], 0.0)
    assert thread.rows(0.0) == [1] * 5
    add_all(thread, caches[5:], 0.02)
    assert thread.rows(0.03) == []
    assert thread.batching.hold_s(0.03) == pytest.approx(RETURN_S)
    add_all(thread, caches[:5], 0.031)
    assert thread.rows(0.031) == [1] * 16


def test_a_group_that_does_not_come_back_is_not_waited_for_long(thread: Thread) -> None:
    caches = [Cache() for _ in range(16)]
    add_all(thread, caches[:5], 0.0)
    assert thread.rows(0.0) == [1] * 5
    add_all(thread, caches[5:], 0.02)
    add_all(thread, caches[:4], 0.03)
    assert [thread.rows(0.03), thread.rows(0.03 + RETURN_S / 2)] == [[], []]
    assert thread.rows(0.03 + RETURN_S) == [1] * 15


def test_prompts_do_not_wait_for_a_group_to_come_back(thread: Thread) -> None:
    thread.decode(0.0)
    thread.add(1, 0.1, round_=ALONE)
    assert thread.rows(0.1) == [1]
    thread.add(30, 0.1)
    assert thread.rows(0.12) == [PIECE]


def test_each_prompt_has_its_piece_but_no_more_than_some(thread: Thread) -> None:
    thread.batching = Batching(1000, PIECE)
    thread.decode(0.0)
    for _ in range(MOST_PIECES + 1):
        thread.add(25)
    assert thread.rows(0.01) == [PIECE] * MOST_PIECES


def test_between_two_decode_steps_there_is_one_piece(thread: Thread) -> None:
    last = thread.decode_often()
    thread.add(150, last)
    assert thread.rows(last + 0.01) == [PIECE]
    assert thread.rows(last + 0.03) == [], "the next decode step finds the thread idle"
    assert thread.batching.hold_s(last + 0.03) == pytest.approx(0.1 * PATIENCE - 0.03, rel=0.1)
    thread.add(1, last + 0.1)
    assert thread.rows(last + 0.1) == [1]
    assert thread.rows(last + 0.11) == [PIECE]


def test_the_first_piece_of_a_short_prompt_is_one_as_well(thread: Thread) -> None:
    last = thread.decode_often()
    thread.add(PIECE + 2, last)
    assert [thread.rows(last + 0.01), thread.rows(last + 0.02)] == [[PIECE], []]
    thread.add(1, last + 0.1)
    assert [thread.rows(last + 0.1), thread.rows(last + 0.11)] == [[1], [2]]


def test_a_decode_step_that_does_not_come_is_not_waited_for(thread: Thread) -> None:
    last = thread.decode_often()
    thread.add(150, last)
    thread.rows(last + 0.01)
    late = last + 0.01 + (thread.batching.hold_s(last + 0.01) or 0.0)
    assert thread.rows(late) == [PIECE]
    assert thread.rows(late + 0.01) == [PIECE]
    assert thread.rows(last + DECODING_S + 0.01) == [MOST], "by then nobody decodes any more"


def test_sessions_that_have_ended_hold_no_prompt_up(thread: Thread) -> None:
    ended, live = Cache(), Cache()
    thread.add(1, 0.0, cache=ended)
    thread.add(1, 0.0, cache=live)
    assert thread.rows(0.0) == [1, 1]
    thread.add(150, 0.1)
    thread.batching.forget(id(ended))
    assert thread.rows(0.1) == [PIECE], "the other one decodes"
    thread.batching.forget(id(live))
    assert thread.batching.hold_s(0.1) == 0
    assert thread.rows(0.1) == [MOST]
    thread.batching.forget(id(live))


def test_what_waits_of_a_session_that_has_ended_is_not_run(thread: Thread) -> None:
    ended = Cache()
    thread.add(150, cache=ended)
    thread.add(30)
    thread.add(1, cache=ended)
    thread.batching.forget(id(ended))
    assert thread.rows(0.0) == [30]
    assert len(thread.batching) == 0


def test_a_session_does_not_hold_up_its_own_replay(thread: Thread) -> None:
    cache = Cache()
    thread.add(1, 0.0, cache=cache)
    thread.rows(0.0)
    thread.add(150, 0.1, cache=cache)
    assert thread.rows(0.1) == [MOST]


def test_a_decode_step_with_a_draft_is_no_prompt_and_runs_whole(thread: Thread) -> None:
    thread.batching = Batching(MOST, 4)
    thread.decode(0.0)
    for rows in (8, 12):
        thread.add(rows, 0.01)
    assert thread.rows(0.01) == [8, 12]
    for _ in range(10):
        thread.add(7, 0.02)
    assert [thread.rows(0.02), thread.rows(0.03)] == [[7] * 10, []]


def test_a_prompt_that_is_held_back_holds_nobody_else_back(thread: Thread) -> None:
    last = thread.decode_often()
    thread.add(150, last)
    thread.rows(last + 0.01)
    thread.add(1, last + 0.02, BACK)
    assert thread.rows(last + 0.02) == [1]


def test_owners_take_turns_however_many_prompts_they_have(thread: Thread) -> None:
    for _ in range(4):
        thread.add(2 * MOST, owner="many")
    thread.add(2 * MOST, owner="one")
    owners = []
    for _ in range(6):
        (waiting,) = thread.batching.take(0.0)
        owners.append(waiting.request.owner)
        if waiting.take(StepReply(b"", (), b"", 0.0, 0.0, 1), 0.0) is None:
            thread.batching.add(waiting)
    assert owners == ["many", "one", "many", "one", "many", "many"]


def owners_of(batch: list[Waiting]) -> list[str]:
    return [waiting.request.owner for waiting in batch]


CHUNK = 30


def test_a_prompt_that_goes_on_is_waited_for_by_those_of_other_owners(thread: Thread) -> None:
    going_on = Cache()
    for _ in range(6):
        thread.add(CHUNK, owner="many", more=True)
    thread.add(CHUNK, owner="one", cache=going_on, more=True)
    assert owners_of(thread.batching.take(0.0)) == ["many", "one"]
    assert thread.rows(0.1) == []
    assert thread.batching.hold_s(0.1) == pytest.approx(RETURN_S)
    thread.add(CHUNK, owner="one", cache=going_on, more=True)
    assert owners_of(thread.batching.take(0.1)) == ["many", "one"]
    assert [thread.rows(0.2), thread.rows(0.2 + RETURN_S / 2)] == [[], []]
    assert thread.rows(0.2 + RETURN_S) == [CHUNK, CHUNK, 4], "it did not come, and has no share"


@pytest.mark.parametrize(
    ("owner", "more", "decode"),
    [
        pytest.param("many", True, False, id="nobody else waits"),
        pytest.param("one", False, False, id="it does not go on"),
        pytest.param("one", True, True, id="decode steps wait"),
    ],
)
def test_else_no_pass_waits_for_a_prompt(thread: Thread, owner: str, more: bool, decode: bool) -> None:
    thread.add(CHUNK, owner=owner, more=more)
    for _ in range(6):
        thread.add(CHUNK, owner="many", more=True)
    assert thread.rows(0.0)
    if decode:
        thread.add(1)
    assert thread.rows(0.1)


def test_an_owner_with_one_prompt_has_as_many_pieces_as_one_with_many(thread: Thread) -> None:
    thread.batching = Batching(1000, PIECE)
    thread.decode(0.0)
    for _ in range(16):
        thread.add(200, owner="many")
    thread.add(200, owner="one")
    assert thread.rows(0.01) == [PIECE, 4 * PIECE, PIECE, PIECE, PIECE]


def test_an_owner_whose_prompts_always_wait_has_its_turn_among_those_who_come_and_go(thread: Thread) -> None:
    """Their next chunks come during the pass after their last."""
    for owner in ["many"] * 40 + [f"one of {number}" for number in range(8)]:
        thread.add(CHUNK, owner=owner)
    turns, returning = [], []
    for _ in range(20):
        batch = thread.batching.take(0.0)
        turns += owners_of(batch)
        for owner in returning:
            thread.add(CHUNK, owner=owner)
        returning = [owner for owner in owners_of(batch) if owner != "many"]
    assert turns.count("many") >= len(turns) // 9 - 1


def test_owners_take_turns_whatever_layers_they_ask_for(thread: Thread) -> None:
    for _ in range(4):
        thread.add(2 * CHUNK, layers=BACK, owner="many")
    thread.add(2 * CHUNK, owner="one")
    assert [owners_of(thread.batching.take(0.0)) for _ in range(3)] == [["many"], ["one"], ["many", "many"]]


def test_a_decode_step_of_other_layers_waits_for_one_pass_of_prompts(thread: Thread) -> None:
    thread.add(1, layers=BACK)
    assert thread.rows(0.0) == [1]
    for _ in range(16):
        thread.add(150, 0.1)
    assert 1 not in thread.rows(0.1)
    thread.add(1, 0.1, BACK)
    assert thread.rows(0.2) == [1]


def test_decode_steps_that_fill_every_pass_leave_room_for_a_prompt_in_every_other(thread: Thread) -> None:
    thread.add(150, owner="prompt")
    passes = []
    for i in range(4):
        for _ in range(6 - len(thread.batching)):
            thread.add(16, 0.01 * i, owner="steps")
        batch = thread.batching.take(0.01 * i)
        passes.append(owners_of(batch).count("prompt"))
        thread.batching.add(*[one for one in batch if one.take(StepReply(b"", (), b"", 0.0, 0.0, 1), 0.0) is None])
    assert passes == [0, 1, 0, 1]


def test_steps_of_other_layers_have_a_pass_of_their_own(thread: Thread) -> None:
    thread.add(1, layers=BACK)
    thread.add(1)
    thread.add(1, layers=BACK)
    assert [thread.rows(0.0), thread.rows(0.0), thread.rows(0.0)] == [[1, 1], [1], []]


def test_the_answer_to_a_prompt_in_pieces_tells_of_all_of_them() -> None:
    waiting = Waiting(StepRequest(ALL, Cache(), 0, 2 * PIECE, [1] * 2 * PIECE, None), lambda reply: None, 0.0)
    for hidden in (b"one ", b"two"):
        waiting.cut(PIECE)
        answer = waiting.take(StepReply(hidden, (), b"", 0.5, 0.25, 1, processor_s=0.125), 0.0)
    assert answer == StepReply(b"one two", (), b"", 1.0, 0.5, 1, processor_s=0.25)


def test_a_prompt_is_cut_though_more_than_its_last_row_is_wanted() -> None:
    step = StepRequest(ALL, Cache(), 0, 50, list(range(50)), None, logit_rows=25, want_hidden=True)
    waiting, pieces = Waiting(step, lambda reply: None, 0.0), []
    answer: object = None
    while answer is None:
        waiting.cut(PIECE)
        pieces.append((waiting.piece.start, waiting.piece.rows, waiting.piece.logit_rows))
        answer = waiting.take(StepReply(b"%d " % waiting.piece.rows, (), b"logits", 0.0, 0.0, 1), 0.0)
    assert pieces == [(0, PIECE, 0), (PIECE, 5, 0), (PIECE + 5, 25, 25)]
    assert answer == StepReply(b"20 5 25 ", (), b"logits", 0.0, 0.0, 1)


def test_a_piece_that_fails_is_the_answer_to_the_whole_prompt() -> None:
    waiting = Waiting(StepRequest(ALL, Cache(), 0, 50, [1] * 50, None), lambda reply: None, 0.0)
    waiting.cut(PIECE)
    error = Internal("no")
    assert waiting.take(error, 0.0) is error
