"""Drafts: what is guessed, what is accepted, and how long a draft pays."""

from __future__ import annotations

import random
from collections.abc import Sequence

from peers.drafting import MAX_DRAFT, Drafter, Rounds, verified
from peers.executor import SampleRequest
from swarm.sampling import SampleResult, SamplingParams

FREE, DEAR = (0.2, 0.0), (0.02, 0.04)
"""Seconds of a round, and of each row more."""


def measured(line: tuple[float, float], batch: int = 1) -> Rounds:
    rounds = Rounds()
    for number in range(200):
        rounds.note(number % 4, line[0] + line[1] * (number % 4), batch)
    return rounds


def drafter(tokens: Sequence[int], line: tuple[float, float] = FREE, batch: int = 1) -> Drafter:
    made = Drafter(tokens)
    made.rounds = measured(line, batch)
    return made


def rounds(prompt: Sequence[int], text: Sequence[int], line: tuple[float, float] = FREE) -> tuple[int, float]:
    """In which ``text`` is generated after ``prompt``, and their seconds, each as long as ``line`` says."""
    made, at, count, seconds = Drafter(prompt), 0, 0, 0.0
    while at < len(text):
        draft = made.propose(len(text) - at - 1)
        right = next((n for n, (a, b) in enumerate(zip(draft, text[at:], strict=False)) if a != b), len(draft))
        for token in text[at : at + right + 1]:
            made.append(token)
        took = line[0] + line[1] * len(draft)
        made.note_round(len(draft), right, took, 1)
        at, count, seconds = at + right + 1, count + 1, seconds + took
    return count, seconds


def check(drafts: tuple[int, ...], truth: Sequence[int]) -> list[int]:
    """The tokens that are sampled after ``[1]`` when the model says ``truth`` as long as the text is right."""
    asked: list[int] = []

    def sample_row(row: int, history: Sequence[int]) -> SampleResult:
        asked.append(row)
        assert list(history) == [1, *truth[:row]]
        return SampleResult(truth[row], 0.0)

    request = SampleRequest(SamplingParams(), [1], 1, rows=len(drafts) + 1, drafts=drafts)
    tokens = [result.token_id for result in verified(request, sample_row)]
    assert asked == list(range(len(tokens))), "no row is sampled that is not needed"
    return tokens


def test_what_is_accepted_is_what_the_model_says_and_the_first_wrong_guess_is_replaced() -> None:
    assert check((), [5]) == [5]
    assert check((5, 6, 7), [5, 6, 7, 8]) == [5, 6, 7, 8]
    assert check((5, 9, 7), [5, 6, 7, 8]) == [5, 6]
    assert check((9, 6, 7), [5, 6, 7, 8]) == [5]


def test_text_that_occurred_before_is_proposed_again() -> None:
    known = list(range(10, 40))
    assert drafter([*known, 10, 11, 12]).propose(5) == (13, 14, 15, 16, 17)


def test_the_newest_of_the_longest_matches_is_taken() -> None:
    text = [1, 2, 3, 4, 50, 9, 2, 3, 4, 60, 8, 8, 1, 2, 3, 4]
    assert drafter(text).propose(1) == (50,)


def test_a_period_goes_on_past_the_end_of_the_text() -> None:
    assert drafter([7, 8, 9] * 4).propose(7) == (7, 8, 9, 7, 8, 9, 7)


def test_a_copy_goes_on_after_a_token_that_was_replaced() -> None:
    known = list(range(10, 60))
    made = drafter([*known, 10, 11, 12, 13])
    made.append(99)  # instead of 14
    assert made.propose(3) == (15, 16, 17)


def test_without_a_match_there_is_no_draft() -> None:
    assert drafter(range(50)).propose(8) == ()
    assert drafter([]).propose(8) == ()
    assert drafter([3]).propose(8) == ()


def test_a_draft_has_no_more_than_the_limit() -> None:
    made = drafter(range(100))
    for token in range(60):
        made.append(token)
    assert len(made.propose(1000)) == MAX_DRAFT
    assert len(made.propose(3)) == 3
    assert made.propose(0) == ()
    assert made.propose(-1) == ()


def test_wrong_guesses_end_drafts_where_rows_cost_time_and_right_ones_bring_them_back() -> None:
    made = drafter([1, 2, 3] * 3)
    made.rounds = measured((0.02, 0.01))
    for fresh in range(100, 180):  # after 1, 2 comes something new each time
        for token in (1, 2, fresh):
            made.append(token)
    made.append(1)
    made.append(2)
    assert made.propose(8) == ()
    for _ in range(20):
        for token in (3, 4, 5, 6, 7, 8, 1, 2):
            made.append(token)
    assert made.propose(3) == (3, 4, 5)


def test_rows_that_cost_as_much_as_rounds_are_not_drafted() -> None:
    text = [*range(100), *range(50)]
    assert drafter(text, FREE).propose(8)
    assert drafter(text, DEAR).propose(8) == ()


def test_a_row_counts_for_every_session_of_the_batch() -> None:
    text = [*range(100), *range(50)]
    alone = drafter(text, (0.05, 0.003)).propose(15)
    crowded = drafter(text, (0.05, 0.003), batch=16).propose(15)
    assert len(alone) > len(crowded)


def test_the_line_is_found_and_one_slow_round_does_not_move_it_far() -> None:
    rounds = measured((0.1, 0.01))
    base, row = rounds.line()
    assert 0.095 < base < 0.105
    assert 0.009 < row < 0.011
    rounds.note(0, 60.0, 1)
    assert rounds.line()[0] < 0.15


def test_rounds_too_short_for_the_clock_are_no_reason_to_fail() -> None:
    made = drafter([*range(100), *range(50)], (0.0, 0.0))
    made.note_round(3, 3, 0.0, 1)
    assert made.propose(3) == (50, 51, 52)


def test_a_restart_forgets_tokens_and_keeps_what_was_learned() -> None:
    made = drafter([*range(100), *range(50)], DEAR)
    made.restart([7, 8, 9] * 5)
    assert made.propose(3) == ()
    made.rounds = measured(FREE)
    assert made.propose(3) == (7, 8, 9)


def test_drafts_that_cost_more_than_they_brought_have_to_promise_more() -> None:
    text = [*range(100), *range(50)]
    line = (0.05, 0.03)
    trusted, burnt = drafter(text, line), drafter(text, line)
    for _ in range(4):
        burnt.note_round(3, 0, line[0] + 3 * line[1], 1)
    assert trusted.propose(8)
    assert burnt.propose(8) == ()
    for _ in range(400):
        burnt.note_round(0, 0, line[0], 1)
    assert burnt.propose(8), "it is tried again, now and then"


def renamed(name: Sequence[int], count: int = 8, gap: int = 14) -> list[int]:
    """Text of tokens that come once, and ``name`` here and there."""
    return [token for n in range(count) for token in (*range(100 + n * gap, 100 + (n + 1) * gap), *name)]


def test_a_name_that_is_changed_costs_few_rounds() -> None:
    for name, other in (([1], [2]), ([1], [2, 3, 4]), ([1, 2, 3], [4]), ([1], []), ([1], [1, 2])):
        prompt, text = renamed(name), renamed(other)
        free = rounds(prompt, text)[0]
        assert free <= len(text) / 16 + 4 + 2 * len(other), (name, other, free)


def test_names_that_are_never_the_same_cost_a_round_for_each_token_and_little_more() -> None:
    prompt = renamed([1])
    text = [token if token != 1 else 1000 + n for n, token in enumerate(prompt)]
    assert rounds(prompt, text)[0] <= 4 + 8 * 2


def test_text_that_only_seems_to_repeat_itself_takes_little_longer_with_drafts() -> None:
    for line in ((0.175, 0.0008), (0.025, 0.001), (0.025, 0.01)):
        for seed in range(4):
            draw = random.Random(seed)
            text = [min(int(draw.expovariate(0.12)), 60) for _ in range(400)]  # pairs come again, what follows does not
            assert rounds(text[:100], text[100:], line)[1] < 300 * line[0] / 0.95, (line, seed)
