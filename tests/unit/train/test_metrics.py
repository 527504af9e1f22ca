from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moetrain.train.metrics import (
    EvalReport,
    PeakFlops,
    RouterStats,
    Throughput,
    flatten,
    flatten_lists,
    known_bf16_peak,
    peak_flops,
)


def test_router_stats_of_known_counts() -> None:
    stats = RouterStats.from_counts(1, [6, 2, 0, 0], [0, 4, 2])
    assert stats.load == [0.75, 0.25, 0.0, 0.0]
    assert stats.max_over_mean == 3.0
    assert stats.entropy == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert stats.max_entropy == pytest.approx(math.log(4))
    assert stats.mean_k == pytest.approx(8 / 6)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=64))
def test_entropy_and_imbalance_stay_in_their_bounds(counts: list[int]) -> None:
    stats = RouterStats.from_counts(0, counts, [1])
    assert 0 <= stats.entropy <= stats.max_entropy + 1e-9
    if sum(counts):
        assert sum(stats.load) == pytest.approx(1)
        assert 1 - 1e-9 <= stats.max_over_mean <= len(counts) + 1e-9


def test_a_layer_without_tokens_has_zero_load_and_no_nan() -> None:
    stats = RouterStats.from_counts(0, [0, 0], [0, 0, 0])
    assert (stats.load, stats.entropy, stats.max_over_mean, stats.mean_k) == ([0.0, 0.0], 0.0, 0.0, 0.0)


def test_flat_names_are_tensorboards(report) -> None:
    flat = flatten(report(2))
    assert flat["train/loss"] == 2.0
    assert flat["train/load_balance"] == 0.01
    assert flat["router/layer03/max_over_mean"] == 3.0
    assert flat["router/layer03/log_alpha"] == 0.5
    assert "router/layer03/hyper_norm_ratio" not in flat, "an unknown value has no name"
    assert flatten_lists(report(2)) == {
        "router/layer03/load": [0.75, 0.25, 0.0, 0.0],
        "router/layer03/k_histogram": [0, 4, 2],
    }


def test_an_aux_scalar_may_not_hide_the_steps_own(report) -> None:
    with pytest.raises(AssertionError, match="loss"):
        flatten(report(1, aux={"loss": 0.0}))


def test_a_dense_model_reports_no_router(report) -> None:
    assert not [name for name in flatten(report(1, router=None)) if name.startswith("router/")]


def test_an_evaluation_has_its_own_names() -> None:
    flat = flatten(EvalReport(5, 2.0, math.exp(2.0), None, 1.5))
    assert flat == {"eval/loss": 2.0, "eval/perplexity": math.exp(2.0), "eval/seconds": 1.5}


def test_a_steady_run_reports_its_rate_from_the_first_step() -> None:
    pace = Throughput(flops_per_token=6e6, peak=PeakFlops(2.4e10, "known"), world_size=2)
    assert (pace.tokens_per_second, pace.flops_per_second, pace.mfu, pace.eta_seconds(5)) == (None, None, None, None)
    assert pace.flatten() == {}
    for _ in range(3):
        pace.update(1000, 0.5)
        assert pace.tokens_per_second == pytest.approx(2000)
        assert pace.flops_per_second == pytest.approx(1.2e10)
        assert pace.mfu == pytest.approx(0.25)
        assert pace.eta_seconds(10) == pytest.approx(5.0)
    assert set(pace.flatten()) == {"perf/tokens_per_second", "perf/flops_per_second", "perf/mfu"}


def test_a_slow_first_step_is_forgotten() -> None:
    pace = Throughput()
    pace.update(1000, 30.0)
    for _ in range(100):
        pace.update(1000, 0.5)
    assert pace.tokens_per_second == pytest.approx(2000, rel=0.01)
    assert pace.mfu is None


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),
        ("NVIDIA A1000", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_a_gpu_is_known_by_its_whole_name_or_not_at_all(name: str, teraflops: float | None) -> None:
    assert known_bf16_peak(name) == (None if teraflops is None else pytest.approx(teraflops * 1e12))


def test_a_cpus_peak_is_measured_and_says_so() -> None:
    peak = peak_flops(torch.device("cpu"), torch.float32)
    assert peak.source == "measured"
    assert 1e7 < peak.value < 1e14  # a machine that starves us may take seconds for one product
