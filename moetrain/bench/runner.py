"""Starts the processes that measure, one after another, and gathers what they tell. No torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from moetrain.bench.results import CaseResult, Machine
from moetrain.bench.settings import Settings
from moetrain.errors import DependencyError, MoetrainError

# Page faults of fresh memory cost as much as a small product. Both sides get an allocator that keeps its memory, as
# `moetrain launch local` sets it for training.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30)}
_TAIL_LINES = 20


@dataclass
class Report:
    """All of one call, in the order of the catalog within a number of threads."""

    settings: Settings
    started: str
    load_before: float
    machine: Machine | None = None
    cases: list[CaseResult] = field(default_factory=list)
    load_after: float = 0.0
    seconds: float = 0.0


def run(settings: Settings, on_case: Callable[[CaseResult], None]) -> Report:
    """Measure, one process for each number of threads; `on_case` hears of each point when it is done.

    Raises:
        DependencyError: the device is not there.
        MoetrainError: a baseline disagrees, or a process died.
    """
    begun = time.monotonic()
    started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    report = Report(settings, started, load_before=os.getloadavg()[0])
    for threads in settings.threads:
        with closing(_events(settings.for_threads(threads))) as events:
            for event in events:
                _take(report, event, on_case)
    report.load_after, report.seconds = os.getloadavg()[0], time.monotonic() - begun
    return report


def _take(report: Report, event: dict[str, Any], on_case: Callable[[CaseResult], None]) -> None:
    kind = event["event"]
    if kind == "machine":
        report.machine = report.machine or Machine(**event["machine"])
    elif kind == "peak":
        assert report.machine is not None
        report.machine.add_peaks(event["threads"], event["rates"])
    elif kind == "case":
        report.cases.append(CaseResult.from_dict(event["case"]))
        on_case(report.cases[-1])
    else:
        assert kind == "error", event
        raise (DependencyError if event["kind"] == "DependencyError" else MoetrainError)(event["message"])


def worker_environment(mine: Mapping[str, str], threads: int) -> dict[str, str]:
    """The same for whatever is compared. Threads of 0: what torch takes by itself."""
    numbers = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)} if threads else {}
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    return {**mine, **ALLOCATOR, **numbers, **quiet}


def _events(settings: Settings) -> Generator[dict[str, Any], None, None]:
    command = [sys.executable, "-m", "moetrain.bench.worker", settings.to_json()]
    environment = worker_environment(os.environ, settings.threads[0])
    with tempfile.TemporaryFile("w+", encoding="utf-8") as words:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=words, env=environment, text=True)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                yield json.loads(line)
            code = process.wait()
        finally:  # also when whoever reads is interrupted
            process.kill()
            process.wait()
            process.stdout.close()
        if code != 0:
            words.seek(0)
            tail = "".join(words.readlines()[-_TAIL_LINES:]).rstrip()
            why = f"signal {-code}, perhaps for want of memory" if code < 0 else f"code {code}"
            raise MoetrainError(f"the process that measures ended by {why}; it said last:\n{tail}")
