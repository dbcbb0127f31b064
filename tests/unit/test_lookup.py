"""Copies: where they begin, how they go on through changes, and which changes are expected again."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from peers.lookup import Lookup

SOURCE = tuple(range(100, 160))
"""Sixty tokens, all different."""


def looked_up(*tokens: Iterable[int]) -> Lookup:
    """The first of ``tokens`` are the prompt."""
    prompt, *text = tokens
    made = Lookup(list(prompt))
    for token in (token for part in text for token in part):
        made.append(token)
    return made


def ahead(lookup: Lookup, count: int) -> list[int]:
    """What the copy expects that has agreed longest."""
    return lookup.ahead(lookup.copies[0], count)


def changed(tokens: Sequence[int], before: Sequence[int], after: Sequence[int]) -> list[int]:
    out: list[int] = []
    while len(out) < 1000 and tokens:
        if list(tokens[: len(before)]) == list(before):
            out += after
            tokens = tokens[len(before) :]
        else:
            out.append(tokens[0])
            tokens = tokens[1:]
    return out


def table(names: Iterable[int]) -> list[int]:
    """Rows of ten tokens that differ in one."""
    return [token for name in names for token in (1, 2, 3, 4, 5, 6, name, 7, 8, 9)]


NAMED = [token for index, token in enumerate(SOURCE) for token in ([7, 8, token] if index % 10 == 5 else [token])]
"""``SOURCE`` with 7, 8 before every tenth token."""


def test_after_a_token_that_was_replaced_the_copy_goes_on() -> None:
    assert ahead(looked_up(SOURCE, SOURCE[:10], [1]), 3) == [111, 112, 113]


def test_after_tokens_that_were_put_in_the_copy_goes_on() -> None:
    assert ahead(looked_up(SOURCE, SOURCE[:10], [1, 2, 3, 110]), 3) == [111, 112, 113]


def test_after_tokens_that_were_left_out_the_copy_goes_on() -> None:
    assert ahead(looked_up(SOURCE, SOURCE[:10], SOURCE[14:15]), 3) == [115, 116, 117]


def test_the_further_on_a_token_is_the_more_have_to_be_found() -> None:
    source = [*SOURCE[:12], 5, *SOURCE[12:22], 6, 9, *SOURCE[22:]]
    begun = source[:10]
    assert ahead(looked_up(source, begun, [6]), 1) == [111], "thirteen tokens on: more likely another 6"
    assert ahead(looked_up(source, begun, [6, 9]), 1) == [122]


def test_a_change_is_expected_again_one_token_or_many() -> None:
    for before, after in (([7, 8], [1, 8]), ([7, 8], [1, 2, 3, 4]), ([7, 8], [1]), ([7, 8], []), ([7, 8], [7, 9, 8])):
        text = changed(NAMED, before, after)
        third = NAMED.index(7, NAMED.index(7, NAMED.index(7) + 1) + 1)
        reached = len(changed(NAMED[: third - 2], before, after))
        made = looked_up(NAMED, text[:reached])
        assert ahead(made, 12) == text[reached : reached + 12], (before, after)


def test_changes_with_an_unchanged_token_between_them_are_two() -> None:
    source = [*SOURCE[:8], 1, 2, 3, *SOURCE[8:16], 3, *SOURCE[16:24], 1, *SOURCE[24:]]
    text = changed(changed(source, [1], [11]), [3], [13])
    assert ahead(looked_up(source, text[:15]), 14) == text[15:29]


def test_a_change_that_was_not_made_in_a_place_is_not_expected_in_that_place_but_elsewhere() -> None:
    source = [*SOURCE[:8], 7, *SOURCE[8:16], 40, 7, *SOURCE[16:24], 40, 7, *SOURCE[24:32], 7, *SOURCE[32:]]
    text = [*SOURCE[:8], 1, *SOURCE[8:16], 40, 7, *SOURCE[16:24], 40, 7, *SOURCE[24:32], 1, *SOURCE[32:]]
    assert ahead(looked_up(source, text[:17]), 2) == [40, 1]
    assert ahead(looked_up(source, text[:22]), 14) == text[22:36]


def test_a_copy_that_has_agreed_for_long_is_not_lost_to_one_that_is_like_the_last_tokens() -> None:
    aside = [1, 120, 121, 122, 50, 51]
    assert ahead(looked_up([*SOURCE, *aside], SOURCE[:20], [1], SOURCE[20:23]), 2) == [123, 124]


def test_a_copy_that_has_agreed_less_than_another_does_not_teach_changes() -> None:
    rows = table(range(61, 73))
    made = looked_up([*SOURCE, *rows], SOURCE[50:], rows[:-10])
    assert ahead(made, 10) == rows[-10:], "the last row, which the others are not changed from"


def test_a_prompt_that_ends_in_a_copy_has_its_changes() -> None:
    text = changed(NAMED, [7], [1, 2])
    reached = text.index(1, text.index(1) + 1) - 2
    assert ahead(looked_up([*NAMED, *text[:reached]]), 12) == text[reached : reached + 12]


def test_rows_of_a_table_in_a_prompt_are_not_changes_of_each_other() -> None:
    rows = table(range(61, 65))
    assert ahead(looked_up([*SOURCE, *rows, *range(900, 910)], SOURCE[50:], rows[:3]), 17) == rows[3:20]


def test_changes_outlast_a_restart() -> None:
    text = changed(NAMED, [7], [1, 2])
    made = looked_up(NAMED, text[:30])
    made.restart([*NAMED, *SOURCE[:3]])
    assert ahead(made, 6) == text[3:9]


def test_a_period_goes_on_past_the_end_of_the_text() -> None:
    assert ahead(looked_up([7, 8, 9] * 4), 7) == [7, 8, 9, 7, 8, 9, 7]


def test_what_is_expected_is_never_outside_the_text() -> None:
    for seed in range(60):
        draw = random.Random(seed)
        kinds = draw.choice((1, 2, 3, 5, 9))
        prompt = [draw.randrange(kinds) for _ in range(draw.randrange(50))]
        made = Lookup(prompt)
        for step in range(120):
            for copy in made.copies:
                expected = made.ahead(copy, 15)
                assert len(expected) == 15, seed
                assert set(expected) <= set(range(kinds)), seed
            copied = prompt and draw.random() < 0.7
            made.append(prompt[step % len(prompt)] if copied else draw.randrange(kinds))
