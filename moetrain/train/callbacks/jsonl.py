"""`metrics.jsonl`: one JSON object a line, for scripts."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, TextIO

from moetrain.train.callback import Callback, TrainerView, is_logged
from moetrain.train.callbacks.records import replace_file, to_json
from moetrain.train.metrics import EvalReport, SaveReport, StepReport, flatten, flatten_lists

FILE = "metrics.jsonl"


class JsonlCallback(Callback):
    """Writes a row per logged step (`"kind": "train"`), validation (`"eval"`) and save (`"checkpoint"`), each flushed
    at once.

    Rows carry `iteration` and the flat names of `metrics.flatten`. A run that resumes at step s first drops the rows
    beyond s, which the earlier process wrote after its last checkpoint, and when it validates at s once more (because s
    is the last) the row of the validation before; so every step stands in the file once. Rank 0.
    """

    def __init__(self) -> None:
        self._file: TextIO | None = None

    def on_train_start(self, trainer: TrainerView) -> None:
        if trainer.rank == 0:
            self._open(trainer)

    def on_step_end(self, trainer: TrainerView, report: StepReport) -> None:
        if self._file is not None and is_logged(trainer, report):
            row = {**flatten(report), **trainer.throughput.flatten(), **flatten_lists(report)}
            self._write("train", report.iteration, row)

    def on_evaluate(self, trainer: TrainerView, report: EvalReport) -> None:
        if self._file is None:
            return
        if report.iteration == trainer.start_iteration:
            self._close()
            self._open(trainer, again="eval")
        self._write("eval", report.iteration, flatten(report))

    def on_checkpoint(self, trainer: TrainerView, report: SaveReport) -> None:
        if self._file is not None:
            self._write("checkpoint", report.iteration, {**flatten(report), "checkpoint/error": report.error})

    def on_train_end(self, trainer: TrainerView) -> None:
        self._close()

    def on_error(self, trainer: TrainerView, exc: BaseException) -> None:
        self._close()

    def _open(self, trainer: TrainerView, again: str = "") -> None:
        path = trainer.run_dir / FILE
        drop_rows_beyond(path, trainer.start_iteration, trainer.log, again)
        self._file = path.open("a", encoding="utf-8")

    def _write(self, kind: str, iteration: int, row: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(to_json({"kind": kind, "iteration": iteration, **row}) + "\n")
        self._file.flush()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def drop_rows_beyond(path: Path, iteration: int, log: logging.Logger, again: str = "") -> None:
    """Leaves in `path` only whole rows with `iteration` at most the given one; does nothing where it is all of them.

    Of the kind `again`, which is about to be written for that iteration, only rows below it.
    A last line that a crash tore is dropped in silence; any other line that is no row is dropped with a warning.
    """
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines(keepends=True)
    kept, damaged = [], 0
    for line in lines:
        kind, at = _kind_and_iteration(line)
        if at is None:
            damaged += line is not lines[-1]
        elif at < iteration or (at == iteration and kind != again):
            kept.append(line)
    if damaged:
        log.warning("%s: dropped %d damaged line(s)", path, damaged)
    if "".join(kept) != text:
        replace_file(path, "".join(kept))


def _kind_and_iteration(line: str) -> tuple[Any, int | None]:
    """Of a row; no iteration for what is not one of our rows, or has lost its end."""
    if not line.endswith("\n"):
        return None, None
    try:
        row = json.loads(line)
    except ValueError:
        return None, None
    at = row.get("iteration") if isinstance(row, dict) else None
    return (row.get("kind"), at) if isinstance(at, int) else (None, None)
