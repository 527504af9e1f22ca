"""The process that measures: `python -m moetrain.bench.worker SETTINGS`, one number of threads, one JSON object a line.

A process of its own, because OpenMP and the allocator read their environment once, when they are loaded.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from moetrain.bench.catalog import Benchmark, chosen, count_points
from moetrain.bench.machine import describe, peak_rates
from moetrain.bench.measure import Clock, clock_for, measure
from moetrain.bench.problem import NotHereError, load
from moetrain.bench.results import CaseResult, Point
from moetrain.bench.settings import Settings
from moetrain.errors import DependencyError, MoetrainError
from moetrain.ops import extension_info
from moetrain.runtime.logs import quiet_imports
from moetrain.runtime.preemption import exit_with_parent

_PEAK_SHARE = 0.02  # of the time; before and after, because a shared machine is not always the same
_MOST_PEAK_SECONDS = 4.0


def run(settings: Settings, tell: Callable[..., None]) -> None:
    """Measure everything that `settings` asks for, for its only number of threads.

    Raises:
        DependencyError: the device is not there, or our operators have no kernels for it.
        DisagreementError: a baseline's result is not ours.
    """
    (threads,) = settings.threads
    _check_device(settings.device)
    if threads:
        torch.set_num_threads(threads)
    clock = clock_for(settings.device, threads)
    tell("machine", machine=asdict(describe(settings.device)))
    peak_seconds = min(_PEAK_SHARE * settings.budget, _MOST_PEAK_SECONDS)
    tell("peak", threads=threads, rates=peak_rates(settings.device, clock, peak_seconds))
    left, end = count_points(settings), time.perf_counter() + settings.budget - peak_seconds
    for name, benchmark in chosen(settings).items():
        for point in benchmark.points(settings):
            if settings.device == "cuda":
                torch.cuda.empty_cache()  # the last point's blocks have other sizes, and two sets may not fit
            share = max(end - time.perf_counter(), 0.0) / left
            tell("case", case=_run_case(name, benchmark, point, threads, clock, share).to_dict())
            left -= 1
    tell("peak", threads=threads, rates=peak_rates(settings.device, clock, peak_seconds))


def _check_device(device: str) -> None:
    if device != "cuda":
        return
    if not torch.cuda.is_available():
        raise DependencyError(
            f"--device is cuda, but torch {torch.__version__} sees no CUDA device; legal here: cpu "
            "(`moetrain doctor` says what is missing)"
        )
    if not extension_info().cuda:
        raise DependencyError(
            "--device is cuda, but our operators were built without CUDA kernels; legal here: cpu "
            "(docs/how-to/extension.md says how to build them)"
        )


def _run_case(name: str, benchmark: Benchmark, point: Point, threads: int, clock: Clock, seconds: float) -> CaseResult:
    """NotImplementedError is what torch raises for an operator without a kernel for the device."""
    try:
        problem = load(benchmark.builder)(point)
        return measure(name, point, threads, problem, clock, seconds)
    except (NotHereError, NotImplementedError, torch.OutOfMemoryError) as error:
        return CaseResult(name, point, threads, unavailable=(str(error).splitlines() or [""])[0])


def main() -> None:
    """Standard output is for JSON alone: what libraries print to it goes to standard error."""
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(event: str, **fields: Any) -> None:
        print(json.dumps({"event": event, **fields}), file=reports, flush=True)

    exit_with_parent()
    quiet_imports()
    try:
        run(Settings.from_json(sys.argv[1]), tell)
    except MoetrainError as error:
        tell("error", message=str(error), kind=type(error).__name__)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
