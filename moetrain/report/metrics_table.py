"""`metrics.jsonl` as columns. No torch: a login node reads a run's metrics in a blink."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.errors import ReportError

_LAYER = re.compile(r"router/layer(\d+)/")
_NOT_FINITE = {"Infinity": math.inf, "-Infinity": -math.inf, None: math.nan}


@dataclass(frozen=True)
class Row:
    """One line: `values` are scalars by their flat name, `lists` float32 vectors by theirs."""

    kind: str
    iteration: int
    values: dict[str, float]
    lists: dict[str, np.ndarray]


@dataclass(frozen=True)
class Series:
    """A scalar over steps: `steps` int64 and `values` float64 of one length, NaN and infinities as they were logged."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def last(self) -> float | None:
        """The newest value; None in a series without points."""
        return float(self.values[-1]) if len(self.values) else None


@dataclass(frozen=True)
class Frames:
    """A list over steps: `steps` int64 [n], `values` float32 [n, size]."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class MetricsTable:
    """The rows of a run, each step of each kind once, in the order of the steps.

    `damaged` counts lines that are no rows, but for a last one without an end, which a killed process leaves.
    """

    rows: tuple[Row, ...]
    damaged: int

    @property
    def last_step(self) -> int:
        """The newest step of any row."""
        return self.rows[-1].iteration

    @cached_property
    def layers(self) -> list[int]:
        """0-based global numbers of the layers with routing figures."""
        names = set().union(*(row.values.keys() | row.lists.keys() for row in self.rows))
        return sorted({int(found[1]) for name in names if (found := _LAYER.match(name))})

    def series(self, name: str, kind: str = "train") -> Series:
        """A scalar by its flat name, at the steps that have it."""
        points = [(row.iteration, row.values[name]) for row in self._of(kind) if name in row.values]
        return Series(
            np.array([step for step, _ in points], dtype=np.int64), np.array([y for _, y in points], dtype=np.float64)
        )

    def layer_series(self, layer: int, name: str) -> Series:
        """A scalar of a MoE layer, such as `mean_k`."""
        return self.series(f"router/layer{layer:02d}/{name}")

    def layer_frames(self, layer: int, name: str) -> Frames | None:
        """A list of a MoE layer, `load` or `k_histogram`; None where it was never logged. Steps whose list has another
        length than the newest (which a run whose settings changed can have) are left out."""
        key = f"router/layer{layer:02d}/{name}"
        found = [(row.iteration, row.lists[key]) for row in self._of("train") if key in row.lists]
        if not found:
            return None
        size = len(found[-1][1])
        found = [(step, values) for step, values in found if len(values) == size]
        return Frames(np.array([step for step, _ in found], dtype=np.int64), np.stack([values for _, values in found]))

    def _of(self, kind: str) -> Iterator[Row]:
        return (row for row in self.rows if row.kind == kind)


def read_metrics(path: Path) -> MetricsTable:
    """Read the file of a run that has ended, was killed or is still going on.

    A row takes the place of an earlier one of its step, and puts away all rows beyond: they are of a process whose
    steps a later one has taken again.

    Errors: ReportError when the file is absent or holds no training step.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ReportError(f"{path}: not there; a run writes it with its first logged step") from None
    except OSError as error:
        raise ReportError(f"{path}: cannot be read ({error.strerror})") from error
    rows: list[Row] = []
    damaged = 0
    *lines, torn = data.split(b"\n")
    for line in (*lines, torn):
        row = _row_of(line)
        if row is not None and row.kind == "checkpoint":
            continue  # written when a save is over, by when training may be steps further
        if row is not None:
            _drop_what_it_replaces(rows, row)
            rows.append(row)
        elif line.strip() and line is not torn:
            damaged += 1
    if not any(row.kind == "train" for row in rows):
        raise ReportError(f"{path}: holds no training step yet; a run writes the first step and each log_interval-th")
    return MetricsTable(tuple(rows), damaged)


def _drop_what_it_replaces(rows: list[Row], row: Row) -> None:
    while rows and rows[-1].iteration > row.iteration:
        rows.pop()
    first = len(rows)
    while first and rows[first - 1].iteration == row.iteration:
        first -= 1
    rows[first:] = [old for old in rows[first:] if old.kind != row.kind]


def _row_of(line: bytes) -> Row | None:
    """None for what is no row of ours."""
    try:
        tree = json.loads(line)
    except ValueError:  # a UnicodeDecodeError is one
        return None
    if not isinstance(tree, dict) or tree.get("kind") not in ("train", "eval", "checkpoint"):
        return None
    iteration = tree.get("iteration")
    if not isinstance(iteration, int) or isinstance(iteration, bool):
        return None
    values = {name: number for name, value in tree.items() if (number := _number(value)) is not None}
    lists = {name: vector for name, value in tree.items() if (vector := _vector(value)) is not None}
    return Row(tree["kind"], iteration, values, lists)


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    return _NOT_FINITE.get(value) if value is None or isinstance(value, str) else None


def _vector(value: Any) -> np.ndarray | None:
    if not isinstance(value, list) or not value:
        return None
    numbers = [_number(item) for item in value]
    return None if None in numbers else np.array(numbers, dtype=np.float32)
