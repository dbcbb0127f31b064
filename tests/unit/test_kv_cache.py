from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peers.kv_cache import KVBudget, SequenceCache
from swarm.errors import Busy, ConfigError, Gap, TooLong
from swarm.types import LayerRange, SessionId

LAYERS = LayerRange(3, 5)


def session(number: int) -> SessionId:
    return SessionId(f"{number:032x}")


def test_a_cache_stores_each_layer_by_its_number_in_the_model() -> None:
    cache = SequenceCache(LAYERS, kv_heads=2, head_dim=4, capacity=10, dtype=torch.float32)
    keys, values = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    cache.write(4, 5, keys, values)
    stored_keys, stored_values = cache.layer(4)
    assert torch.equal(stored_keys[:, 5:8], keys)
    assert torch.equal(stored_values[:, 5:8], values)


def test_size_is_known_before_anything_is_allocated() -> None:
    cache = SequenceCache(LAYERS, kv_heads=2, head_dim=4, capacity=10, dtype=torch.bfloat16)
    assert cache.size_bytes == SequenceCache.bytes_needed(LAYERS, 2, 4, 10, 2) == 2 * 2 * 2 * 10 * 4 * 2


def test_a_cache_only_grows_at_its_end_and_within_its_room() -> None:
    cache = SequenceCache(LAYERS, 1, 4, capacity=8, dtype=torch.float32)
    cache.check_room(0, 8)
    with pytest.raises(TooLong, match="9 positions exceed the 8"):
        cache.check_room(0, 9)
    with pytest.raises(Gap, match="starts at 1, the KV cache ends at 0"):
        cache.check_room(1, 1)
    cache.length = 6
    cache.truncate(4)
    assert cache.length == 4
    with pytest.raises(Gap):
        cache.truncate(5)


def test_a_full_budget_is_busy_and_names_the_limit() -> None:
    budget = KVBudget(100, max_sessions=2)
    budget.reserve(session(1), 60)
    with pytest.raises(Busy, match="50 bytes asked for, 40 of 100 are free"):
        budget.reserve(session(2), 50)
    budget.reserve(session(2), 40)
    budget.reserve(session(2), 0)
    with pytest.raises(Busy, match="max_cached_sessions: 2 of 2"):
        budget.reserve(session(3), 0)
    assert budget.release(session(1)) == 60
    assert budget.release(session(1)) == 0
    assert (budget.used_bytes, budget.free_bytes, budget.sessions) == (40, 60, 1)


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
                assert sum(held.values()) + size > 120 or (name not in held and len(held) == 4)
            else:
                held[name] = held.get(name, 0) + size
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
