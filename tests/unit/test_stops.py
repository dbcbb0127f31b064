"""Stop texts: whatever pieces the text comes in, what is shown ends where the first of them begins."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm.errors import BadRequest
from swarm.stops import MAX_STOPS, StopFinder

letters = st.text("ab", max_size=12)


def shown(pieces: list[str], stops: str | list[str]) -> tuple[str, bool]:
    finder = StopFinder(stops)
    text = "".join([finder.push(piece) for piece in pieces])
    return text + finder.flush(), finder.found


@given(st.lists(letters, max_size=6), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_pieces_make_no_difference(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    begins = [place for stop in stops if (place := text.find(stop)) >= 0]
    expected, found = shown(pieces, stops)
    assert found == bool(begins)
    if not begins:
        assert expected == text
    else:  # the first that is complete ends it, so one that began before it may be shown in part
        assert expected in {text[:place] for place in begins}


def test_nothing_that_may_become_a_stop_is_shown_early() -> None:
    finder = StopFinder(["END"])
    assert [finder.push(piece) for piece in ("a", "E", "N", "x", "EN", "D", "more")] == ["a", "", "", "ENx", "", "", ""]
    assert finder.found
    assert finder.flush() == ""


def test_one_text_is_not_taken_for_its_letters() -> None:
    assert shown(["a cab, a cabin"], "cabin") == ("a cab, a ", True)


def test_none_is_no_stop() -> None:
    finder = StopFinder(None)
    assert (finder.push("text"), finder.found) == ("text", False)


@pytest.mark.parametrize("stops", ["", [""], ["a", ""], ["a"] * (MAX_STOPS + 1), 7, ["a", 7], [None]], ids=repr)
def test_refused(stops: Any) -> None:
    with pytest.raises(BadRequest):
        StopFinder(stops)
