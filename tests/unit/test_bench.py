"""What ``swarm bench`` concludes from token times."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import pytest

from swarm.bench.drafts import TASKS, speculation
from swarm.bench.processes import cpu_s, peak_mb
from swarm.bench.prompts import prefill
from swarm.bench.runs import Run, hop_shares, percentile, ratio, throughput
from swarm.bench.sections import ONE, SERVER, TRANSFORMERS, Figure, Scale, SwarmContender, speed, thirds
from swarm.commands.bench import rendered
from swarm.errors import SwarmError
from swarm.local import even_ranges
from swarm.sample_text import sample_prompt
from swarm.types import HopTiming, LayerRange, PeerId


def run(*times: float) -> Run:
    return Run([0] * len(times), list(times))


class Steady:
    pids: tuple[int, ...] = ()

    def __init__(self, *token_ids: int) -> None:
        """``token_ids``: of each of its tokens, if it tells them."""
        self.token_ids = token_ids

    async def generate(self, prompt: Sequence[int], max_tokens: int) -> Run:
        return Run([*self.token_ids] * max_tokens, [0.1 * number for number in range(1, max_tokens + 1)])


async def test_texts_of_a_server_that_tells_no_token_ids_are_not_compared() -> None:
    contenders: dict[str, Any] = {ONE: Steady(7), TRANSFORMERS: Steady(7), SERVER: Steady()}
    figures = await speed(contenders, [1], Scale(2, 4, 1), lambda text: None)
    found = {figure.name: figure.value for figure in figures}
    assert found["different texts among all runs"] == 1
    assert found[f"{ONE} / {SERVER}"] == pytest.approx(1.0)
    del contenders[TRANSFORMERS]
    figures = await speed(contenders, [1], Scale(2, 4, 1), lambda text: None)
    assert "different texts among all runs" not in {figure.name for figure in figures}


def test_a_run_counts_from_its_first_token() -> None:
    one = run(0.5, 0.6, 0.7, 0.9)
    assert one.ttft_s == 0.5
    assert one.tokens_per_second == pytest.approx(3 / 0.4)
    assert one.gaps == pytest.approx([0.1, 0.1, 0.2])


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert [percentile(values, share) for share in (0.5, 0.95, 1.0)] == [50, 95, 100]
    assert percentile([7.0], 0.5) == 7


def test_throughput_counts_while_all_decode() -> None:
    assert throughput([run(1.0, 2.0, 3.0)]) == pytest.approx(1.0)
    assert throughput([run(1.0, 2.0, 3.0, 4.0), run(2.0, 2.5, 3.0)]) == pytest.approx(3.0)
    assert throughput([run(0.0, 1.0), run(2.0, 4.0)]) == pytest.approx(3 / 4), "one after the other"


def test_ratios_are_taken_within_rounds() -> None:
    assert ratio([10, 5, 20], [5, 2.5, 10]) == 2


def test_hops_share_a_tokens_time_with_the_wire() -> None:
    def timings(scale: float) -> tuple[HopTiming, ...]:
        return tuple(HopTiming(PeerId("p"), LayerRange(i, i + 1), 0.01 * scale, 0.1, 1) for i in range(2))

    one = Run([1, 2, 3], [1.0, 1.25, 1.5], [timings(9), timings(1), timings(1)])
    shares, rest = hop_shares([one])
    assert [(share.layers, share.queue_s, share.compute_s) for share in shares] == [
        ("0:1", 0.01, 0.1),
        ("1:2", 0.01, 0.1),
    ]
    assert rest == pytest.approx(0.03)
    assert hop_shares([run(1.0, 2.0)]) == ([], 0.0)


def test_peak_memory_of_this_process_and_of_none() -> None:
    assert peak_mb(1) >= 0
    with pytest.raises(SwarmError, match="can't be read"):
        peak_mb(2**22 + 1)


def test_processor_time_is_counted_with_children() -> None:
    before_s = cpu_s([os.getpid()])
    sum(range(3_000_000))
    assert 0 < cpu_s([os.getpid()]) - before_s < 30
    assert cpu_s([]) == 0


def test_a_model_of_one_layer_has_no_middle_third() -> None:
    assert [figure.value for figure in thirds(8.0, [4.0, 2.0, 3.0])] == [0.5, 0.25]
    assert [figure.value for figure in thirds(8.0, [8.0])] == [1.0]


def test_ranges_are_even_and_cover_everything() -> None:
    assert [str(layers) for layers in even_ranges(30, 3)] == ["0:10", "10:20", "20:30"]
    assert [str(layers) for layers in even_ranges(22, 3)] == ["0:7", "7:14", "14:22"]
    assert [str(layers) for layers in even_ranges(2, 3)] == ["0:1", "1:2"]


def test_a_sample_prompt_has_any_length_and_beginning() -> None:
    assert bytes(sample_prompt(Letters(), 14)) == b"The lighthouse"
    assert bytes(sample_prompt(Letters(), 10, shift=4)) == b"lighthouse"
    assert len(sample_prompt(Letters(), 5000, shift=999)) == 5000


def test_figures_are_a_table_by_section() -> None:
    lines = rendered([Figure("a", "x", 1.234, "ms"), Figure("a", "y", 10.0, "MiB"), Figure("b", "z", 2.0, "")])
    assert lines[1:] == ["a        x       1.23  ms", "         y         10  MiB", "b        z          2"]


class Letters:
    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]


class Client:
    tokenizer = Letters()

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return self.tokenizer.encode(messages[0]["content"])


class Recorded:
    """A contender that is done at once."""

    pids: ClassVar[list[int]] = []
    client = Client()

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens = list(tokens)
        self.prompts: list[list[int]] = []

    async def generate(self, prompt: Sequence[int], max_tokens: int, **_: Any) -> Run:
        self.prompts.append(list(prompt))
        return Run(self.tokens, [0.1, 0.2][: len(self.tokens) or 2])


async def test_each_round_of_prefill_has_another_prompt_which_no_server_has_kept() -> None:
    one, other = Recorded(), Recorded()
    figures = await prefill(
        {"one peer": one, "server": other}, lambda number: [number, 7, 7], Scale(3, 4, 8), lambda _: None
    )
    assert one.prompts == other.prompts
    assert len({tuple(prompt) for prompt in one.prompts}) == 1 + 3
    assert [figure.name for figure in figures][-1] == "one peer / server, time"


async def test_an_answer_of_one_token_is_no_measure_of_speculation() -> None:
    """Another model may end its text at once."""
    told: list[str] = []
    assert await speculation(cast(SwarmContender, Recorded([5])), Scale(1, 4, 8), told.append) == []
    assert sum("one token" in line for line in told) == len(TASKS)
