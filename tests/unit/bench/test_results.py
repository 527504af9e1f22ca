"""The arithmetic of ratios, and that nothing is lost between the process that measures and the one that prints."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrain.bench.results import CaseResult, Machine, Point, spread
from moetrain.bench.settings import Settings, default_settings

POINT = Point("cpu", "bf16", 64, 32, 8, 16, 2, "zipf")
seconds = st.floats(1e-6, 1e3)


def case(ours: list[float], theirs: list[float], work: float = 0.0) -> CaseResult:
    return CaseResult("fprop", POINT, 1, ours, {"them": theirs}, work=work)


def test_a_speedup_is_the_median_of_the_ratios_of_pairs_and_not_the_ratio_of_medians() -> None:
    measured = case([1.0, 2.0, 4.0], [3.0, 8.0, 4.0])
    assert measured.speedup("them") == (3.0, 2.0, 3.5)
    assert measured.cost("them") == pytest.approx((1 / 3, 7 / 24, 2 / 3))


@given(st.lists(st.tuples(seconds, st.floats(0.1, 10)), min_size=1, max_size=9), st.floats(0.01, 100))
def test_what_slows_both_sides_of_a_round_does_not_change_the_ratio(rounds: list[tuple[float, float]], ratio: float):
    ours = [time * noise for time, noise in rounds]
    measured = case(ours, [time * ratio for time in ours])
    assert measured.speedup("them") == pytest.approx((ratio,) * 3)
    assert measured.cost("them") == pytest.approx((1 / ratio,) * 3)


@given(st.lists(seconds, min_size=1, max_size=30))
def test_quartiles_surround_the_median(values: list[float]) -> None:
    median, low, high = spread(values)
    assert min(values) <= low <= median <= high <= max(values)


def test_a_baseline_of_the_first_rounds_alone_is_paired_with_those() -> None:
    assert case([2.0, 1.0, 1.0], [40.0]).speedup("them") == (20.0, 20.0, 20.0)


def test_the_rate_is_work_over_the_median_time() -> None:
    assert case([1.0, 2.0, 90.0], [1.0], work=6e9).rate() == 3e9


def test_the_higher_of_two_measured_peaks_is_kept() -> None:
    machine = Machine("cpu", 2, [], "2", "", "")
    machine.add_peaks(1, {"bf16": 5.0, "fp32": 2.0})
    machine.add_peaks(1, {"bf16": 4.0, "fp32": 3.0})
    machine.add_peaks(2, {"bf16": 9.0})
    assert machine.peaks == {1: {"bf16": 5.0, "fp32": 3.0}, 2: {"bf16": 9.0}}


def test_a_result_survives_the_way_between_processes() -> None:
    measured = CaseResult("fprop", POINT, 2, [1.0], {"them": [2.0]}, {"other": "why"}, work=3.0, unit="B")
    assert CaseResult.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_settings_survive_the_way_between_processes(device: str) -> None:
    settings = default_settings(device, cores=2)
    assert Settings.from_json(settings.to_json()) == settings


def test_each_process_has_one_number_of_threads_and_its_share_of_the_time() -> None:
    settings = default_settings("cpu", cores=2)
    parts = [settings.for_threads(threads) for threads in settings.threads]
    assert [part.threads for part in parts] == [(1,), (2,)]
    assert sum(part.budget for part in parts) == settings.budget


@pytest.mark.parametrize(
    ("point", "label", "sizes"),
    [
        (POINT, "bf16 E=8 F=16 zipf", "T = 64, D = 32, K = 2"),
        (Point("cpu", "fp32", 9, 4, heads=8, measure="col_sum"), "fp32 col_sum", "L = 9, d = 4, H = 8"),
        (Point("cpu", "fp32", 9, 4, heads=8, measure="row_max", causal=True), "fp32 row_max causal", "L = 9, d = 4, H = 8"),  # noqa: E501
    ],
)  # fmt: skip
def test_a_row_is_named_by_what_tells_it_apart_and_a_table_by_what_is_common(point: Point, label: str, sizes: str):
    assert (point.label(), point.sizes()) == (label, sizes)
