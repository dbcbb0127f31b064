from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peers.kv_budget import KVBudget
from swarm.errors import Busy, ConfigError
from swarm.types import SessionId


def session(number: int) -> SessionId:
    return SessionId(f"{number:032x}")


def test_a_full_budget_is_busy_and_names_the_limit() -> None:
    budget = KVBudget(100, max_sessions=2)
    budget.reserve(session(1), 60)
    with pytest.raises(Busy, match="50 bytes asked for, 40 of 100 are free"):
        budget.reserve(session(2), 50)
    budget.reserve(session(2), 10)
    budget.reserve(session(2), 40)
    with pytest.raises(Busy, match="1 bytes asked for, 0 of 100 are free"):
        budget.reserve(session(2), 41)
    assert budget.held(session(2)) == 40, "a refusal changes nothing"
    with pytest.raises(Busy, match="max_cached_sessions: 2 of 2"):
        budget.reserve(session(3), 0)
    assert budget.release(session(1)) == 60
    assert budget.release(session(1)) == 0
    assert (budget.used_bytes, budget.free_bytes, budget.sessions) == (40, 60, 1)


def test_what_a_session_gives_back_is_there_for_others() -> None:
    budget = KVBudget(100, max_sessions=2)
    budget.reserve(session(1), 90)
    budget.reserve(session(1), 30)
    budget.reserve(session(2), 70)
    assert (budget.used_bytes, budget.free_bytes) == (100, 0)


def test_the_idle_session_that_was_used_longest_ago_goes_first() -> None:
    budget = KVBudget(100, max_sessions=3)
    for number, size in ((1, 30), (2, 30), (3, 40)):
        budget.reserve(session(number), size)
    assert budget.evictable(10) == [], "nobody is idle"
    for number in (1, 2, 3):
        budget.mark_idle(session(number))
    assert budget.evictable(0) == []
    assert budget.evictable(10) == [session(1)]
    assert budget.evictable(0, sessions=1) == [session(1)]
    budget.touch(session(1))
    assert budget.evictable(10) == [session(2)]
    budget.mark_idle(session(1))
    assert budget.evictable(80) == [session(2), session(3), session(1)]
    assert budget.evictable(101) == [], "evicting everybody would not do"


def test_others_give_way_after_the_idle_ones_in_their_order_and_no_more_than_it_takes() -> None:
    budget = KVBudget(100, max_sessions=4)
    for number in (1, 2, 3, 4):
        budget.reserve(session(number), 25)
    budget.mark_idle(session(3))
    others = [session(2), session(3), session(1)]
    assert budget.evictable(20, others=others) == [session(3)]
    assert budget.evictable(50, others=others) == [session(3), session(2)]
    assert budget.evictable(75, others=others) == [session(3), session(2), session(1)]
    assert budget.evictable(76, others=others) == [], "nobody goes in vain"


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="known: lru"):
        KVBudget(1, 1, policy="random")


@given(
    st.lists(st.tuples(st.sampled_from(["reserve", "release", "idle", "touch"]), st.integers(0, 5), st.integers(0, 50)))
)
def test_the_books_balance(actions: list[tuple[str, int, int]]) -> None:
    budget = KVBudget(120, max_sessions=4)
    held: dict[SessionId, int] = {}
    for action, number, size in actions:
        name = session(number)
        if action == "reserve":
            try:
                budget.reserve(name, size)
            except Busy:
                assert sum(held.values()) - held.get(name, 0) + size > 120 or (name not in held and len(held) == 4)
            else:
                held[name] = size
        elif action == "release":
            assert budget.release(name) == held.pop(name, 0)
        elif action == "idle":
            budget.mark_idle(name)
        else:
            budget.touch(name)
        assert budget.used_bytes == sum(held.values()) <= 120
        assert budget.sessions == len(held)
        assert set(budget.evictable(120)) <= set(held)
    for name in list(held):
        budget.release(name)
    assert (budget.used_bytes, budget.sessions) == (0, 0)
