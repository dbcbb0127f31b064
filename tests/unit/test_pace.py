"""What a peer tells of its speed: how a step's time divides, and what becomes of it on a busy machine."""

from __future__ import annotations

import pytest

from peers.batching import Waiting
from peers.engine import MOST_SURPRISE, QUEUE_HALF_S, SLOWDOWN_HALF_S, SMOOTHING, Pace
from peers.executor import SampleRequest, StepRequest
from peers.machine import Speed, _speed
from swarm.sampling import SamplingParams
from swarm.types import LayerRange

FAR = 1000


def waiting(layers: int, *, rows: int = 1, head: bool = False) -> Waiting:
    sample = SampleRequest(SamplingParams(), [0], 1) if head else None
    request = StepRequest(LayerRange(0, layers), None, 0, rows, [0] * rows, None, sample)  # type: ignore[arg-type]
    return Waiting(request, lambda reply: None, since=0.0)


def calibrated() -> Pace:
    pace = Pace()
    pace.calibrate(0.001, 0.002, 0.01)
    return pace


def test_a_time_divides_into_step_layers_and_head() -> None:
    speed = _speed([0.003, 0.004], [0.011, 0.022, 0.022], [0.016, 0.03], layers=5, prefill_s=0.1)
    assert speed.decode_s_per_layer == pytest.approx(0.002 * 2)
    assert speed.step_s == pytest.approx(0.001 * 2), "the usual step takes twice as long as the quickest"
    assert speed.head_s == pytest.approx(0.005 * 2)
    assert speed.prefill_s_per_token_layer == 0.1


def test_steps_that_others_disturb_do_not_count_while_a_third_goes_undisturbed() -> None:
    speed = _speed([0.003] * 9, [0.011] * 4 + [0.03] * 5, [0.016] * 9, layers=5, prefill_s=0.1)
    assert speed.decode_s_per_layer == pytest.approx(0.002)


def test_of_two_measurements_the_one_with_the_quicker_step_counts() -> None:
    first, second = Speed(0.002, 0.1, step_s=0.001, head_s=0.01), Speed(0.001, 0.1, step_s=0.008, head_s=0.01)
    assert first.or_quicker(second, layers=4) == second.or_quicker(first, layers=4) == first
    assert first.or_quicker(second, layers=20) == second.or_quicker(first, layers=20) == second


@pytest.mark.parametrize(("ones", "alls", "layers"), [([0.03], [0.01], 5), ([0.001], [0.01], 5), ([0.01], [0.01], 1)])
def test_noise_gives_no_nonsense(ones: list[float], alls: list[float], layers: int) -> None:
    speed = _speed(ones, alls, [0.005], layers, 0.1)
    assert speed.step_s + layers * speed.decode_s_per_layer == pytest.approx(0.01)
    assert speed.step_s >= 0
    assert speed.decode_s_per_layer >= 0.5 * 0.01 / layers
    assert speed.head_s == 0.0


@pytest.mark.parametrize("slowdown", [0.5, 1.0, 2.0])
def test_the_slowdown_is_that_of_whole_steps_whatever_their_layers(slowdown: float) -> None:
    pace = calibrated()
    for _ in range(FAR):
        pace.note([waiting(4)], [0.0], slowdown * (0.001 + 4 * 0.002), 0.0)
        pace.note([waiting(8, head=True)], [0.0], slowdown * (0.001 + 8 * 0.002 + 0.01), 0.0)
    assert pace.slowdown == pytest.approx(slowdown)


def test_batches_prompts_and_hiccups_say_little_of_the_pace() -> None:
    pace = calibrated()
    pace.note([waiting(4), waiting(4)], [0.0, 0.0], 1.0, 0.0)
    pace.note([waiting(4, rows=100)], [0.0], 1.0, 0.0)
    assert pace.slowdown == 1.0
    pace.note([waiting(4)], [0.0], 100.0, 0.0)
    assert pace.slowdown == pytest.approx(1 + (MOST_SURPRISE - 1) * SMOOTHING)


def test_nothing_is_known_of_an_engine_that_was_not_measured() -> None:
    pace = Pace()
    pace.note([waiting(4)], [0.5], 1.0, 0.0)
    assert pace.slowdown == 1.0
    assert pace.queue_s == pytest.approx(SMOOTHING * 0.5)


def test_what_a_busy_moment_told_fades_while_nothing_is_run() -> None:
    pace = calibrated()
    for _ in range(FAR):
        pace.note([waiting(4)], [0.5], 3.0 * (0.001 + 4 * 0.002), 100.0)
    assert (pace.slowdown_at(100.0), pace.queue_s_at(100.0)) == pytest.approx((3.0, 0.5))
    assert pace.slowdown_at(100.0 + SLOWDOWN_HALF_S) == pytest.approx(2.0)
    assert pace.queue_s_at(100.0 + QUEUE_HALF_S) == pytest.approx(0.25)
    later = 100.0 + 20 * SLOWDOWN_HALF_S
    pace.note([waiting(4)], [0.0], 0.001 + 4 * 0.002, later)
    assert (pace.slowdown_at(later), pace.queue_s_at(later)) == pytest.approx((1.0, 0.0), abs=1e-5)
