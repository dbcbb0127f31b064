"""The rules of a stage for rows that were run from guesses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from peers.checkpoints import CheckpointLog
from peers.stage import Stage, Target
from peers.stage_input import OpenRequest, Work
from swarm.errors import BadRequest
from swarm.sampling import SamplingParams
from swarm.types import LayerRange, PeerAddress, PeerId, SessionId

OWNER, BEFORE, AFTER = PeerId("owner"), PeerId("before"), PeerId("after")
TEXT = (1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2)
"""After which 3, 4, 5 ... are guessed."""
KNOWN = len(TEXT)


@dataclass
class FakeCache:
    length: int = 0

    def truncate(self, length: int) -> None:
        self.length = min(self.length, length)


def opened(epoch: int = 1, keep: int = 0, **extra: Any) -> OpenRequest:
    wishes = {"token_ids": TEXT, "end_ids": frozenset(), "stop_at": 40, "no_kv_cache": False} | extra
    return OpenRequest(
        session=SessionId("s"),
        epoch=epoch,
        layers=LayerRange(2, 4),
        max_positions=64,
        keep=keep,
        previous=frozenset({BEFORE}),
        step_mode=False,
        sampling=SamplingParams(),
        prompt_length=KNOWN,
        speculate=True,
        **wishes,
    )


def stage(*, last: bool, **extra: Any) -> Stage:
    """With all rows before the newest token's, and one target."""
    log = None if last else CheckpointLog(1)
    made = Stage(opened(**extra), OWNER, first=False, last=last, cache=FakeCache(), log=log)
    run(made, 0, KNOWN - 1)
    made.follow([Target(PeerAddress(AFTER, ()), 0, 1, KNOWN - 1)])
    return made


def run(stage: Stage, start: int, rows: int, draft: int = 0, draft_start: int = 0) -> None:
    work = Work(epoch=stage.epoch, start=start, rows=rows, draft=draft, draft_start=draft_start)
    stage.truncate(start)
    stage.begin(work)
    assert isinstance(stage.cache, FakeCache)
    stage.cache.length = start + rows
    if stage.log is not None:
        stage.log.append(start, bytes(rows))


def ran_guess(limit: int = 3) -> Stage:
    """A last stage to which the rows of its guess have come back."""
    made = stage(last=True)
    draft = made.guess(limit)
    assert (draft.start, draft.ids) == (KNOWN, (3, 4, 5)[:limit])
    run(made, KNOWN - 1, 1 + len(draft.ids), draft.number, draft.start)
    return made


def sample(stage: Stage, *token_ids: int) -> None:
    stage.add_tokens([(token_id, b"") for token_id in token_ids])


def test_a_stage_keeps_keys_and_values_as_it_was_opened() -> None:
    made = stage(last=False, kv="int8")
    made.reopen(opened(2, kv="int8"))
    with pytest.raises(BadRequest, match="keeps its keys and values as"):
        made.reopen(opened(3))
    with pytest.raises(BadRequest, match="there are: model, int8"):
        opened(kv="int3")


def test_the_rows_of_a_guess_are_verified_in_one_pass() -> None:
    made = ran_guess()
    wanted = made.to_sample(KNOWN - 1, KNOWN + 3)
    assert wanted is not None
    assert (wanted.rows, wanted.drafts) == (4, (3, 4, 5))
    assert list(wanted.history) == list(TEXT)


def test_right_guesses_are_not_sent_round_the_ring_again() -> None:
    made = ran_guess()
    sample(made, 3, 4, 9)
    (target,) = made.targets
    assert made.next_rows(target, 8) == (KNOWN + 1, KNOWN + 2)
    assert made.tokens[KNOWN + 2] == 9


def test_the_owner_gets_right_guesses_as_tokens() -> None:
    made = stage(last=True)
    owner = Target(None, 0, 1, KNOWN - 1)
    made.follow([owner, *made.targets])
    draft = made.guess(3)
    run(made, KNOWN - 1, 4, draft.number, draft.start)
    sample(made, 3, 4, 9)
    assert made.next_rows(owner, 8) == (KNOWN - 1, KNOWN + 2)


def test_a_new_epoch_keeps_right_guesses_and_forgets_wrong_ones() -> None:
    made = ran_guess()
    sample(made, 3, 9)
    made.reopen(opened(2, keep=KNOWN + 2, token_ids=(*TEXT, 3, 9)))
    assert made.have == KNOWN + 1


def test_a_new_epoch_forgets_rows_of_which_a_stage_does_not_know_whether_they_were_right() -> None:
    made = stage(last=False)
    run(made, KNOWN - 1, 4, 1, KNOWN)
    made.reopen(opened(2, keep=KNOWN + 2))
    assert made.have == KNOWN
    assert made.log is not None
    assert made.log.end == KNOWN


def test_the_next_frame_says_that_everything_before_it_was_right() -> None:
    made = stage(last=False)
    run(made, KNOWN - 1, 4, 1, KNOWN)
    run(made, KNOWN + 2, 1)
    made.reopen(opened(2, keep=KNOWN + 3))
    assert made.have == KNOWN + 3


def test_rows_of_a_draft_that_the_ring_has_passed_on_are_not_sampled_after() -> None:
    made = ran_guess(1)
    sample(made, 3)
    assert made.draft_start == KNOWN
    newer = made.guess(2)
    run(made, KNOWN, 2, newer.number - 1, KNOWN - 1)  # the older draft's rest, in a frame of its own
    assert made.to_sample(KNOWN, KNOWN + 2) is None
    run(made, KNOWN, 2, newer.number - 1, KNOWN + 1)
    wanted = made.to_sample(KNOWN, KNOWN + 2)
    assert wanted is not None
    assert wanted.drafts == (), "what these rows were run from is not known any more"
    run(made, KNOWN, 3, newer.number, newer.start)
    wanted = made.to_sample(KNOWN, KNOWN + 3)
    assert wanted is not None
    assert wanted.drafts == newer.ids == (4, 5)


def test_a_successor_does_not_sample_after_the_guesses_of_another() -> None:
    made = stage(last=True)
    run(made, KNOWN - 1, 4, 7, KNOWN)
    wanted = made.to_sample(KNOWN - 1, KNOWN + 3)
    assert wanted is not None
    assert wanted.drafts == ()


def test_a_guess_stays_within_what_was_asked_for_and_before_the_end_of_text() -> None:
    assert stage(last=True, stop_at=KNOWN + 3).guess(8).ids == (3, 4)
    assert stage(last=True, stop_at=KNOWN + 1).guess(8).ids == ()
    assert stage(last=True, end_ids=frozenset({4})).guess(8).ids == (3,)


def test_an_end_of_text_among_the_sampled_tokens_ends_them() -> None:
    made = stage(last=True, end_ids=frozenset({4}))
    sample(made, 3, 4, 5)
    assert made.ended
    assert made.tokens[KNOWN:] == [3, 4]


def test_without_a_kv_cache_nothing_is_guessed() -> None:
    assert stage(last=True, no_kv_cache=True).guess(8).ids == ()


def test_a_token_and_its_draft_go_as_one_frame_without_an_acknowledgement() -> None:
    made = stage(last=False)
    run(made, KNOWN - 1, 4, 1, KNOWN)
    (target,) = made.targets
    assert made.next_rows(target, 128) == (KNOWN - 1, KNOWN + 3)
    assert made.is_decode(KNOWN - 1, KNOWN + 3)
    run(made, KNOWN, 4)
    assert not made.is_decode(KNOWN, KNOWN + 4)


def test_a_newer_epoch_forgets_positions_without_outputs() -> None:
    """A request that came in pieces has failed in a later one."""
    made = stage(last=False)
    assert isinstance(made.cache, FakeCache)
    made.cache.length += 16
    made.reopen(opened(2, keep=40))
    assert made.log is not None
    assert made.have == made.log.end == KNOWN - 1


def test_a_last_stage_needs_the_text() -> None:
    with pytest.raises(BadRequest, match="the text so far"):
        stage(last=True, token_ids=())
