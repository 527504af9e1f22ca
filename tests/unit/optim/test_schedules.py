from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrain.config.schema import ScheduleConfig
from moetrain.optim.schedules import learning_rate

PEAK = 3e-4
DECAYING = ("wsd", "cosine", "linear")


@st.composite
def runs(draw: st.DrawFn, types: tuple[str, ...] = (*DECAYING, "constant")) -> tuple[ScheduleConfig, int]:
    """A legal schedule and its train_iters."""
    iters = draw(st.integers(1, 300))
    kind = draw(st.sampled_from(types))
    warmup = draw(st.integers(0, iters))
    settings: dict = {"type": kind, "warmup_iters": warmup}
    if kind != "constant":
        settings["min_lr"] = draw(st.sampled_from([0.0, PEAK / 10, PEAK]))
        if draw(st.booleans()):
            low, high = (1, iters - warmup) if kind == "wsd" else (warmup + 1, 2 * iters + 1)
            if low <= high:
                settings["decay_iters"] = draw(st.integers(low, high))
    return ScheduleConfig(**settings), iters


def curve(schedule: ScheduleConfig, iters: int) -> list[float]:
    return [learning_rate(schedule, PEAK, iters, i) for i in range(iters + 1)]


@given(runs())
def test_the_rate_never_exceeds_the_peak(run) -> None:
    schedule, iters = run
    assert max(curve(schedule, iters)) <= PEAK * (1 + 1e-12)


@given(runs())
def test_after_warm_up_the_rate_never_falls_below_min_lr_and_never_rises(run) -> None:
    schedule, iters = run
    after = curve(schedule, iters)[schedule.warmup_iters :]
    assert min(after) >= schedule.min_lr
    assert all(later <= earlier + 1e-18 for earlier, later in pairwise(after))


@given(runs())
def test_warm_up_is_linear_and_its_last_step_has_the_peak_rate(run) -> None:
    schedule, iters = run
    warm = curve(schedule, iters)[: schedule.warmup_iters]
    assert warm == pytest.approx([PEAK * n / schedule.warmup_iters for n in range(1, len(warm) + 1)])


@given(runs(types=("wsd",)))
def test_wsd_takes_no_step_at_zero_and_is_at_min_lr_when_training_ends(run) -> None:
    schedule, iters = run
    *steps, end = curve(schedule, iters)
    assert min(steps) > 0
    if schedule.warmup_iters < iters:
        assert end == schedule.min_lr


@given(runs(types=("cosine", "linear")))
def test_cosine_and_linear_reach_min_lr_at_decay_iters_and_not_before(run) -> None:
    schedule, iters = run
    end = schedule.decay_iters or iters
    if end > schedule.warmup_iters:
        assert learning_rate(schedule, PEAK, iters, end) == schedule.min_lr
        assert learning_rate(schedule, PEAK, iters, end - 1) > schedule.min_lr or schedule.min_lr == PEAK


def test_wsd_decays_over_the_last_fifth_by_default() -> None:
    rates = curve(ScheduleConfig(type="wsd", warmup_iters=10, min_lr=PEAK / 10), 100)
    assert rates[9:81] == [PEAK] * 72
    assert rates[90] == pytest.approx(PEAK * 0.55)
    assert rates[100] == PEAK / 10


def test_wsd_decays_over_what_a_long_warm_up_leaves() -> None:
    rates = curve(ScheduleConfig(type="wsd", warmup_iters=9), 10)
    assert rates[8:] == [PEAK, PEAK, 0.0]


def test_cosine_is_half_way_at_half_time() -> None:
    schedule = ScheduleConfig(type="cosine", min_lr=1e-4)
    assert learning_rate(schedule, PEAK, 200, 100) == pytest.approx(2e-4)
    assert learning_rate(schedule, PEAK, 200, 50) == pytest.approx(1e-4 + 2e-4 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_linear_is_linear() -> None:
    schedule = ScheduleConfig(type="linear", decay_iters=40)
    assert [learning_rate(schedule, PEAK, 200, i) for i in (0, 10, 20, 40, 150)] == pytest.approx(
        [PEAK, 0.75 * PEAK, 0.5 * PEAK, 0.0, 0.0]
    )
