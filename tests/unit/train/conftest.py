"""A trainer's view and reports for callbacks, without a trainer."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moetrain.train.metrics import PeakFlops, RouterStats, StepReport, Throughput


@dataclass
class View:
    """What callbacks see; `config` holds the settings that they read."""

    run_dir: Path
    rank: int = 0
    world_size: int = 2
    start_iteration: int = 0
    train_iters: int = 6
    log_interval: int = 2
    stop_after: int | None = None
    layout: Any = None
    log: logging.Logger = field(default_factory=lambda: logging.getLogger("moetrain.test"))
    throughput: Throughput = field(default_factory=lambda: Throughput(1e6, PeakFlops(1e10, "known"), 2))

    @property
    def config(self) -> Any:
        names = ("train_iters", "log_interval", "stop_after")
        return SimpleNamespace(training=SimpleNamespace(**{name: getattr(self, name) for name in names}))


@pytest.fixture
def view(tmp_path: Path) -> View:
    return View(tmp_path)


@pytest.fixture
def report():
    """Makes the report of one step."""

    def make(iteration: int, **changes) -> StepReport:
        stats = RouterStats.from_counts(3, [6, 2, 0, 0], [0, 4, 2], controllers={"log_alpha": 0.5})
        values: dict[str, Any] = {
            "iteration": iteration,
            "train_iters": 6,
            "loss": 4.0 / iteration,
            "grad_norm": 0.5,
            "lr": 1e-3,
            "tokens": 1000,
            "consumed_samples": 10 * iteration,
            "consumed_tokens": 1000 * iteration,
            "step_seconds": 0.25,
            "aux": {"load_balance": 0.01},
            "router": [stats],
        }
        return StepReport(**(values | changes))

    return make
