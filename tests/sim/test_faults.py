"""A thousand seeded fault schedules against every invariant, and proof that breaking a rule is noticed."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from peers.stage import Stage
from peers.stage_input import OpenRequest, Work
from swarm import protocol_pb2 as pb
from swarm.transcript import Transcript
from tests.sim.schedules import run_seed

MUTATION_SEEDS = 200
GUESS_SEEDS = 500
"""Few seeds end an epoch while a wrong guess is on its way."""
LIMIT_S = 1800


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S)
def test_no_seed_loses_doubles_or_changes_a_token(sim_seeds: range) -> None:
    """In processes of their own: both cores, and none of pytest's heap for the collector to walk."""
    middle = (sim_seeds.start + sim_seeds.stop) // 2
    halves = ((sim_seeds.start, middle), (middle, sim_seeds.stop))

    def run(span: tuple[int, int]) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tests.sim.schedules", str(span[0]), str(span[1])]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)

    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(run, [span for span in halves if span[0] < span[1]]):
            assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]


def caught_within(seeds: int) -> int | None:
    """The first seed that notices, if any."""
    for seed in range(seeds):
        try:
            run_seed(seed)
        except Exception:
            return seed
    return None


def test_a_broken_truncation_rule_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def keep_everything(self: Stage, length: int) -> None:
        pass

    monkeypatch.setattr(Stage, "truncate", keep_everything)
    assert caught_within(MUTATION_SEEDS) is not None


def test_a_missing_epoch_check_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    accept = Stage.accept

    def accept_any_epoch(self: Stage, work: Work, waiting_limit: int) -> bool:
        work.epoch = self.epoch
        return accept(self, work, waiting_limit)

    monkeypatch.setattr(Stage, "accept", accept_any_epoch)
    assert caught_within(MUTATION_SEEDS) is not None


def test_a_broken_commit_rule_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = Transcript.commit

    def commit_whatever_comes(self: Transcript, output: pb.Output) -> None:
        output.start = len(self) - 1
        commit(self, output)

    monkeypatch.setattr(Transcript, "commit", commit_whatever_comes)
    assert caught_within(MUTATION_SEEDS) is not None


def test_accepting_a_wrong_guess_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peers.drafting.agrees", lambda draft, sampled: True)
    assert caught_within(MUTATION_SEEDS) is not None


def test_keeping_rows_of_guesses_that_nobody_verified_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    adopt = Stage._adopt

    def keep_guesses(self: Stage, request: OpenRequest) -> None:
        self.draft = 0
        adopt(self, request)

    monkeypatch.setattr(Stage, "_adopt", keep_guesses)
    assert caught_within(GUESS_SEEDS) is not None
