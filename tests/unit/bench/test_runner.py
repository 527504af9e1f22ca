"""The processes that measure: their environment, and what becomes of one that fails."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moetrain.bench import runner, worker
from moetrain.bench.problem import NotHereError
from moetrain.bench.settings import Settings, default_settings
from moetrain.errors import DependencyError, MoetrainError

TINY = replace(
    default_settings("cpu", 1),
    dtypes=("fp32",),
    experts=(2,),
    ffn=(8,),
    hidden=8,
    tokens=8,
    routing=("balanced",),
    only=("plan", "fprop"),
    budget=0.1,
)


def told(settings: Settings) -> list[dict[str, Any]]:
    """What a worker in this process tells."""
    events: list[dict[str, Any]] = []
    threads = torch.get_num_threads()
    try:
        worker.run(settings, lambda event, **fields: events.append({"event": event, **fields}))
    finally:
        torch.set_num_threads(threads)
    return events


def test_both_sides_get_the_same_allocator_and_threads_and_nothing_else_is_lost() -> None:
    environment = runner.worker_environment({"HOME": "/home", "OMP_NUM_THREADS": "9"}, threads=2)
    assert environment.items() >= {
        "HOME": "/home",
        "OMP_NUM_THREADS": "2",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "17179869184",
    }.items()  # fmt: skip
    assert runner.worker_environment({"OMP_NUM_THREADS": "9"}, threads=0)["OMP_NUM_THREADS"] == "9"


def test_a_worker_tells_machine_peak_cases_and_peak_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moetrain.bench.machine.PEAK_SIZE", {"cpu": 64})
    events = told(TINY)
    assert [event["event"] for event in events] == ["machine", "peak", "case", "case", "peak"]
    report = runner.Report(TINY, "", 0.0)
    heard = []
    for event in events:
        runner._take(report, event, heard.append)
    assert [case.benchmark for case in report.cases] == ["fprop", "plan"] and heard == report.cases
    assert report.machine is not None and report.machine.torch == torch.__version__
    assert min(report.machine.peaks[1].values()) > 0


def test_what_is_not_in_this_build_is_a_case_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> None:
        raise NotHereError("not in this build\nnor in another")

    monkeypatch.setattr("moetrain.bench.machine.PEAK_SIZE", {"cpu": 64})
    monkeypatch.setattr("moetrain.bench.gemm.fprop", absent)
    events = told(TINY)
    assert events[2]["case"]["unavailable"] == "not in this build" and events[2]["case"]["ours"] == []
    assert events[3]["case"]["ours"]


def test_cuda_on_a_machine_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DependencyError, match=r"--device is cuda, but torch .* sees no CUDA device; legal here: cpu"):
        told(default_settings("cuda", 1))


@pytest.mark.parametrize(
    ("kind", "error"), [("DisagreementError", MoetrainError), ("DependencyError", DependencyError)]
)
def test_an_error_of_the_worker_is_raised_here(kind: str, error: type[MoetrainError]) -> None:
    event = {"event": "error", "kind": kind, "message": "y of them is not ours"}
    with pytest.raises(error, match="y of them is not ours"):
        runner._take(runner.Report(TINY, "", 0.0), event, lambda case: None)


def test_a_worker_that_dies_leaves_its_last_words() -> None:
    with pytest.raises(MoetrainError, match=r"(?s)ended by code 1; it said last:.*AssertionError: nonsense"):
        runner.run(replace(TINY, routing=("nonsense",)), lambda case: None)
