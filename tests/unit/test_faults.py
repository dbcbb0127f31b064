"""The schedule of faults, and what is concluded from token times."""

from __future__ import annotations

import pytest

from peers.drafting import MAX_DRAFT
from swarm.errors import BadRequest
from swarm.faults import KINDS, Observation, judge, medians, plan_trials


def test_a_schedule_repeats_with_its_seed_and_changes_with_it() -> None:
    plans = [plan_trials(seed, list(KINDS), 24, 48, 3) for seed in (5, 5, 6)]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]


def test_kinds_positions_and_sampling_take_turns() -> None:
    trials = plan_trials(1, ["kill", "prefill"], 40, 48, 3)
    faults = [fault for trial in trials for fault in trial.faults]
    assert [fault.kind for fault in faults[:4]] == ["kill", "prefill", "kill", "prefill"]
    kills = [fault for fault in faults if fault.kind == "kill"]
    assert {fault.hop for fault in kills} == {0, 1, 2}
    assert {0, 46} < {fault.token for fault in kills} <= set(range(47))
    assert {fault.token for fault in faults if fault.kind == "prefill"} == {-1}
    assert {(trial.sampled, trial.faults[0].kind) for trial in trials} == {
        (sampled, kind) for sampled in (True, False) for kind in ("kill", "prefill")
    }


@pytest.mark.parametrize("kinds", range(1, len(KINDS) + 1))
def test_each_kind_strikes_greedy_and_sampled_generations_early_and_late(kinds: int) -> None:
    """One kind alone struck greedy ones only, and each of three always early, or always late."""
    chosen = list(KINDS)[:kinds]
    trials = plan_trials(2, chosen, 6 * kinds, 48, 3)
    for kind in chosen:
        cases = [(trial.sampled, trial.faults[0].token) for trial in trials if trial.faults[0].kind == kind]
        assert {sampled for sampled, _ in cases} == {True, False}
        if kind != "prefill":
            assert {(True, 0), (False, 0), (True, 46), (False, 46)} < set(cases)


def test_many_faults_in_one_generation_come_in_the_order_of_their_tokens() -> None:
    (trial,) = plan_trials(3, ["kill"], 10, 200, 3, in_one=True)
    tokens = [fault.token for fault in trial.faults]
    assert tokens == sorted(set(tokens))
    assert len(tokens) == 10


@pytest.mark.parametrize("in_one", [True, False])
@pytest.mark.parametrize(("drafts", "at_once"), [(True, MAX_DRAFT + 1), (False, 1)])
def test_the_last_fault_strikes_while_tokens_are_still_on_their_way(in_one: bool, drafts: bool, at_once: int) -> None:
    """Whatever comes at once with the token that it waits for: with it came the last ones, and nothing was struck."""
    trials = plan_trials(1, ["kill"], 96, 96, 3, in_one=in_one, drafts=drafts)
    assert max(fault.token for trial in trials for fault in trial.faults) + at_once == 96 - 1


@pytest.mark.parametrize(("tokens", "drafts"), [(8, False), (23, True)])
def test_so_few_tokens_are_enough(tokens: int, drafts: bool) -> None:
    assert len(plan_trials(0, ["kill"], 3, tokens, 3, drafts=drafts)) == 3
    with pytest.raises(BadRequest, match=f"at least {tokens} tokens"):
        plan_trials(0, ["kill"], 3, tokens - 1, 3, drafts=drafts)


@pytest.mark.parametrize(
    ("kinds", "faults", "tokens"), [(["flood"], 1, 48), (["kill"], 0, 48), (["kill"], 1, 4), ([], 2, 48)]
)
def test_a_schedule_that_makes_no_sense_is_refused(kinds: list[str], faults: int, tokens: int) -> None:
    with pytest.raises(BadRequest):
        plan_trials(0, kinds, faults, tokens, 3)


TIMES = [1.0, 1.1, 1.2, 2.2, 2.3, 2.4, 2.9, 3.0]


def test_a_stall_is_the_longest_gap_after_the_fault_less_the_median() -> None:
    seen = [Observation(0, False, "kill", 2), Observation(0, False, "drain", 5)]
    judge(seen, list(range(8)), TIMES, list(range(8)), began=0.5, ttft_s=0.4)
    assert [round(one.stall_s or 0, 6) for one in seen] == [0.9, 0.4]
    assert all(one.identical for one in seen)
    assert medians(seen) == {"kill": pytest.approx(0.9), "drain": pytest.approx(0.4)}


def test_a_fault_during_prefill_delays_the_first_token() -> None:
    seen = [Observation(0, False, "prefill", -1)]
    judge(seen, list(range(8)), TIMES, list(range(8)), began=0.5, ttft_s=0.2)
    assert seen[0].stall_s == pytest.approx(0.3)


def test_other_tokens_fewer_tokens_and_errors_are_all_different() -> None:
    for tokens, error, note in (
        ([0, 1, 9, 3, 4, 5, 6, 7], "", "differs from token 2 on"),
        ([0, 1, 2, 3, 4], "", "5 tokens"),
        ([0, 1, 2, 3, 4, 5, 6, 7], "no_route: nobody", "no_route: nobody"),
    ):
        seen = [Observation(0, True, "kill", 2)]
        judge(seen, tokens, TIMES[: len(tokens)], list(range(8)), began=0.5, ttft_s=0.2, error=error)
        assert not seen[0].identical
        assert seen[0].note == note


def test_no_token_at_all_is_no_stall() -> None:
    seen = [Observation(0, True, "prefill", -1)]
    judge(seen, [], [], [1, 2], began=0.0, ttft_s=0.2, error="unreachable: gone")
    assert seen[0].stall_s is None
    assert not medians(seen)
