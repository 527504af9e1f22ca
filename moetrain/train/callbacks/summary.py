"""`summary.json`: how the run ended, on one screen."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from moetrain.train.callback import Callback, TrainerView
from moetrain.train.callbacks.records import replace_file, to_json
from moetrain.train.metrics import EvalReport, SaveReport, StepReport

FILE = "summary.json"


class SummaryCallback(Callback):
    """Writes the closing figures of this process: outcome, first and last loss, tokens, pace, last validation,
    last checkpoint. Rank 0."""

    def __init__(self) -> None:
        self._started = 0.0
        self._first: StepReport | None = None
        self._last: StepReport | None = None
        self._evaluation: EvalReport | None = None
        self._checkpoint: Path | None = None
        self._saves = self._failed_saves = 0
        self._stall = 0.0
        self._tokens = 0

    def on_train_start(self, trainer: TrainerView) -> None:
        self._started = time.monotonic()

    def on_step_end(self, trainer: TrainerView, report: StepReport) -> None:
        self._first = self._first or report
        self._last = report
        self._tokens += report.tokens

    def on_evaluate(self, trainer: TrainerView, report: EvalReport) -> None:
        self._evaluation = report

    def on_checkpoint(self, trainer: TrainerView, report: SaveReport) -> None:
        self._stall += report.stall_seconds
        if report.error is None:
            self._checkpoint = report.path
            self._saves += 1
        else:
            self._failed_saves += 1

    def on_train_end(self, trainer: TrainerView) -> None:
        done = self._last.iteration if self._last else trainer.start_iteration
        self._write(trainer, "finished" if done >= trainer.config.training.train_iters else "stopped")

    def on_error(self, trainer: TrainerView, exc: BaseException) -> None:
        self._write(trainer, "failed", error=f"{type(exc).__name__}: {exc}")

    def _write(self, trainer: TrainerView, outcome: str, error: str | None = None) -> None:
        if trainer.rank != 0:
            return
        seconds = time.monotonic() - self._started
        first, last, evaluation = self._first, self._last, self._evaluation
        summary: dict[str, Any] = {
            "outcome": outcome,
            "error": error,
            "start_iteration": trainer.start_iteration,
            "iteration": last.iteration if last else trainer.start_iteration,
            "train_iters": trainer.config.training.train_iters,
            "world_size": trainer.world_size,
            "first_loss": first.loss if first else None,
            "last_loss": last.loss if last else None,
            "consumed_tokens": last.consumed_tokens if last else None,
            "skipped_steps": last.skipped_total if last else 0,
            "seconds": seconds,
            "tokens_per_second": self._tokens / seconds if seconds > 0 else None,
            "eval_iteration": evaluation.iteration if evaluation else None,
            "eval_loss": evaluation.loss if evaluation else None,
            "eval_perplexity": evaluation.perplexity if evaluation else None,
            "eval_scores": evaluation.scores if evaluation else {},
            "checkpoint": self._checkpoint.name if self._checkpoint else None,
            "saves": self._saves,
            "failed_saves": self._failed_saves,
            "save_stall_seconds": self._stall,
        }
        replace_file(trainer.run_dir / FILE, to_json(summary) + "\n")
