"""The clocks of a swarm agree, whoever's is wrong."""

from __future__ import annotations

import math
import random

import pytest

from swarm import _hivemind
from swarm.dht_node import _LocalStorage
from swarm.dht_time import TOLERANCE_S, DhtTime, dht_time

NOW = 1.8e9


def wrong_by(seconds: float) -> DhtTime:
    return DhtTime(lambda: NOW + seconds)


def ask(one: DhtTime, others: list[DhtTime]) -> None:
    one.agree([other() - one() for other in others])


@pytest.mark.parametrize("wrong_s", [-1e8, -300.0, 46.0, 7200.0])
def test_who_joins_with_a_wrong_clock_takes_the_swarms_time(wrong_s: float) -> None:
    clock = wrong_by(wrong_s)
    assert clock.difference() is None
    ask(clock, [wrong_by(1.0)])
    assert clock() == pytest.approx(NOW + 1)
    side = "behind" if wrong_s < 0 else "ahead of"
    assert clock.difference() == f"{abs(wrong_s - 1):.0f} s {side} the swarm's"


def test_small_differences_are_let_be() -> None:
    clock = wrong_by(0.0)
    for other in (3.0, -4.0, TOLERANCE_S):
        ask(clock, [wrong_by(other)])
    assert clock.offset_s == 0


@pytest.mark.parametrize("said", [math.nan, math.inf, -math.inf, -NOW, 1e12])
def test_what_is_no_time_counts_for_nothing(said: float) -> None:
    clock = wrong_by(300.0)
    clock.agree([said])
    assert clock.offset_s == 0
    clock.agree([said, -300.0, said])
    assert clock() == NOW, "it joins only now"


def test_one_liar_among_the_initial_peers_moves_nobody() -> None:
    for honest in (1, 2, 3):
        clock = wrong_by(0.0)
        ask(clock, [wrong_by(1e6), *(wrong_by(1.0) for _ in range(honest))])
        assert clock.offset_s == 0


def test_who_has_joined_is_not_moved_by_newcomers() -> None:
    clock = wrong_by(0.0)
    ask(clock, [wrong_by(0.5), wrong_by(-0.5)])
    ask(clock, [wrong_by(0.5), wrong_by(-0.5), wrong_by(300.0)])
    assert clock.offset_s == 0


def test_two_that_join_through_each_other_at_once_agree() -> None:
    one, other = wrong_by(0.0), wrong_by(300.0)
    for _ in range(3):
        ahead_s = other() - one()
        one.agree([ahead_s])
        other.agree([-ahead_s])
    assert abs(one() - other()) <= TOLERANCE_S


def test_a_swarm_with_some_wrong_clocks_keeps_the_worlds_time() -> None:
    rng = random.Random(1)
    errors = [rng.uniform(-2, 2) for _ in range(30)] + [-86_400.0, 300.0, -120.0, 90.0, 1e7]
    rng.shuffle(errors)
    swarm = [wrong_by(0.0), wrong_by(1.0)]
    for error in errors:
        ask(newcomer := wrong_by(error), rng.sample(swarm, 2))
        swarm.append(newcomer)
    for _ in range(100):
        ask(one := rng.choice(swarm), rng.sample([other for other in swarm if other is not one], 3))
    assert all(abs(clock() - NOW) <= 2 * TOLERANCE_S for clock in swarm)


def test_a_clock_that_is_put_right_later_is_followed() -> None:
    wrong_s = 300.0
    clock = DhtTime(lambda: NOW + wrong_s)
    ask(clock, [wrong_by(0.0)])
    wrong_s = 0.0
    for _ in range(8):
        ask(clock, [wrong_by(0.0), wrong_by(0.0)])
    assert abs(clock() - NOW) <= TOLERANCE_S
    assert clock.difference() is None


@pytest.mark.parametrize("offset_s", [-600.0, 600.0])
def test_what_hivemind_keeps_expires_by_the_swarms_time(offset_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dht_time, "offset_s", offset_s)
    storage = _LocalStorage()
    assert storage.store_subkey(b"key", "lives", b"value", dht_time() + 10)
    assert not storage.store_subkey(b"key", "expired", b"value", dht_time() - 10)
    assert [subkey for subkey, _ in storage.get(b"key").value.items()] == ["lives"]
    for module in ("hivemind.dht.node", "hivemind.dht.protocol", "hivemind.dht.routing"):
        assert _hivemind.load(module).get_dht_time is dht_time
