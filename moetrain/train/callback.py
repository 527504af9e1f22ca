"""What happens around the steps: hooks of a run, and what of the trainer a hook may look at."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from moetrain.config.schema import RunConfig
from moetrain.train.metrics import EvalReport, SaveReport, StepReport, Throughput

if TYPE_CHECKING:
    from moetrain.config.layout import ParallelLayout


class TrainerView(Protocol):
    """The part of the trainer that callbacks read. They change nothing in it."""

    @property
    def config(self) -> RunConfig:
        """The whole, validated configuration."""
        ...

    @property
    def run_dir(self) -> Path:
        """Run folder; exists."""
        ...

    @property
    def rank(self) -> int:
        """Global rank. Every rank calls every hook; those that write or print do so on rank 0."""
        ...

    @property
    def world_size(self) -> int:
        """Number of processes."""
        ...

    @property
    def start_iteration(self) -> int:
        """Completed steps when this process began: 0, or the step of the checkpoint that it resumed."""
        ...

    @property
    def layout(self) -> ParallelLayout:
        """Which rank sits in which group."""
        ...

    @property
    def throughput(self) -> Throughput:
        """Recent pace; the trainer updates it before it calls `on_step_end`."""
        ...

    @property
    def log(self) -> logging.Logger:
        """The rank's logger."""
        ...


class Callback:
    """Hooks that do nothing; override what you need.

    Every rank calls every hook of every callback in the same order. An exception in a hook ends the run, so that a full
    disk is seen and not slept through.
    """

    def on_train_start(self, trainer: TrainerView) -> None:
        """Everything is built and the checkpoint, if any, is loaded; no step has been taken."""

    def on_step_end(self, trainer: TrainerView, report: StepReport) -> None:
        """A step is complete (or was skipped: `report.skipped`)."""

    def on_evaluate(self, trainer: TrainerView, report: EvalReport) -> None:
        """A validation is complete."""

    def on_checkpoint(self, trainer: TrainerView, report: SaveReport) -> None:
        """A save is over: `report.path` is committed, or `report.error` says why not. Training may be steps further."""

    def on_train_end(self, trainer: TrainerView) -> None:
        """The run leaves cleanly: it is finished, or has been asked to stop."""

    def on_error(self, trainer: TrainerView, exc: BaseException) -> None:
        """The run dies of `exc`. Peers may be gone: no communication here."""


def is_logged(trainer: TrainerView, report: StepReport) -> bool:
    """Whether this step is written down: every `training.log_interval`, this process's first step, and the last."""
    training = trainer.config.training
    return report.iteration % training.log_interval == 0 or report.iteration in (
        trainer.start_iteration + 1,
        training.train_iters,
        training.stop_after,
    )
