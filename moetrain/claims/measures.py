"""What one training of the laboratory measured, read from its run folder."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain.config.schema import RunConfig
from moetrain.config.size import flops_per_token, parameter_count

_LAST = 0.2  # share of the run over which the mean K is averaged


@dataclass(frozen=True)
class Measured:
    """One arm with one seed.

    Attributes:
        loss: held-out loss at the end, nats per token.
        curve: (step, training loss) of every logged step.
        mean_k: experts per token over the last fifth of the run, all MoE layers.
        step_seconds: median time of a step. Trainings ran side by side, so it is rough.
        parameters, flops: of the model; floating-point operations per token, forward and backward, at `mean_k`.
    """

    loss: float
    curve: list[tuple[int, float]]
    mean_k: float
    step_seconds: float
    parameters: int
    flops: float


def is_finished(run: Path) -> bool:
    """Whether the training in this folder came to its end."""
    try:
        return json.loads((run / "summary.json").read_text(encoding="utf-8"))["outcome"] == "finished"
    except FileNotFoundError:
        return False


def measure(run: Path, config: RunConfig) -> Measured:
    """Read a finished run."""
    rows = list(_rows(run / "metrics.jsonl"))
    steps = [row for row in rows if row["kind"] == "train"]
    *_, evaluation = (row for row in rows if row["kind"] == "eval")
    last = steps[-max(1, round(len(steps) * _LAST)) :]
    mean_k = statistics.fmean(row["train/mean_k"] for row in last)
    return Measured(
        loss=evaluation["eval/loss"],
        curve=[(row["iteration"], row["train/loss"]) for row in steps],
        mean_k=mean_k,
        step_seconds=statistics.median(row["train/step_seconds"] for row in steps),
        parameters=parameter_count(config.model).total,
        flops=flops_per_token(config.model, mean_k),
    )


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)
