"""A run folder as a report reads it: settings, metrics, how it ended, which checkpoints it has."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moetrain.checkpoint.folders import find_step_folder, step_folders
from moetrain.checkpoint.manifest import MANIFEST_NAME
from moetrain.config.loader import load_config
from moetrain.config.schema import RunConfig
from moetrain.errors import ReportError
from moetrain.report.metrics_table import MetricsTable, read_metrics


@dataclass(frozen=True)
class RunFolder:
    """`summary` is that of the newest process if it has ended in order, else None; `written` is when metrics were."""

    path: Path
    config: RunConfig
    table: MetricsTable
    summary: dict[str, Any] | None
    written: datetime

    @property
    def checkpoints(self) -> dict[int, Path]:
        """Committed checkpoints by step, the newest first."""
        folders = step_folders(self.path / "checkpoints")
        return {step: folder for step, folder in folders if (folder / MANIFEST_NAME).is_file()}

    def checkpoint(self, step: int | None) -> Path | None:
        """The folder of a step, or of the newest; None where no step is asked for and there is none.

        Errors: ReportError for a step that is not there, CheckpointError for a damaged `latest`.
        """
        present = self.checkpoints
        if step is None:
            return find_step_folder(self.path) if present else None
        if step not in present:
            there = ", ".join(map(str, sorted(present))) or "none"
            raise ReportError(f"{self.path / 'checkpoints'}: there is no checkpoint of step {step}; there: {there}")
        return present[step]


def open_run(path: Path) -> RunFolder:
    """Read a run folder.

    Errors: ReportError when it is none or has no metrics; ConfigError when its config.yaml is not legal.
    """
    if not path.is_dir():
        raise ReportError(
            f"{path}: {'not a folder' if path.exists() else 'no such folder'}; give a run's folder (run.dir)"
        )
    config = path / "config.yaml"
    if not config.is_file():
        raise ReportError(
            f"{path} is no run folder: it has no {config.name}, which a run writes as it starts (give its run.dir)"
        )
    metrics = path / "metrics.jsonl"
    table = read_metrics(metrics)
    written = datetime.fromtimestamp(metrics.stat().st_mtime, UTC)
    summary = _closing_summary(path / "summary.json", metrics, table.last_step)
    return RunFolder(path, load_config([config]), table, summary, written)


def _closing_summary(path: Path, metrics: Path, last_step: int) -> dict[str, Any] | None:
    """The summary; None without one, and where it is that of an earlier process, after which metrics went on."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        newer = path.stat().st_mtime >= metrics.stat().st_mtime
    except (OSError, ValueError):
        return None
    reached = summary.get("iteration") if isinstance(summary, dict) else None
    if not isinstance(reached, int):
        return None
    # A failed process ends beyond its last logged step.
    return summary if reached == last_step or (reached > last_step and newer) else None
