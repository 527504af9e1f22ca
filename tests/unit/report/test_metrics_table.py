"""metrics.jsonl comes back as it was written, whatever a run has been through."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moetrain.errors import ReportError
from moetrain.report.metrics_table import read_metrics


def steps(path: Path, text: str) -> list[int]:
    path.write_text(text)
    return read_metrics(path).series("train/loss").steps.tolist()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_scalars_and_lists_come_back_by_name_and_layer(path: Path, rows: Any) -> None:
    path.write_text("\n".join([rows.train(1, 3.5), rows.train(2, 3.25), rows.eval(2, 3.75), ""]))
    table = read_metrics(path)
    assert table.series("train/loss").values.tolist() == [3.5, 3.25]
    assert table.series("eval/loss", "eval").steps.tolist() == [2]
    assert table.layers == [0, 1] and table.last_step == 2 and table.damaged == 0
    load = table.layer_frames(1, "load")
    assert load is not None and load.steps.tolist() == [1, 2]
    np.testing.assert_allclose(load.values, [[0.1, 0.2, 0.3, 0.4]] * 2, rtol=1e-6)
    assert table.layer_series(0, "mean_k").values.tolist() == [2.0, 2.0]
    assert table.layer_series(0, "hyper_norm_ratio").last is None
    assert table.layer_frames(7, "load") is None


def test_what_is_not_finite_keeps_its_place(path: Path, rows: Any) -> None:
    path.write_text("\n".join([rows.train(1, math.nan), rows.train(2, math.inf), rows.train(3, -math.inf), ""]))
    values = read_metrics(path).series("train/loss").values
    assert math.isnan(values[0]) and values[1:].tolist() == [math.inf, -math.inf]


def test_the_last_of_a_repeated_step_counts(path: Path, rows: Any) -> None:
    path.write_text("\n".join([rows.train(1), rows.train(2, 9.0), rows.eval(2), rows.train(2, 4.0), ""]))
    table = read_metrics(path)
    assert table.series("train/loss").values.tolist() == [3.0, 4.0]
    assert table.series("eval/loss", "eval").steps.tolist() == [2]


def test_a_step_taken_again_puts_away_the_steps_beyond_it(path: Path, rows: Any) -> None:
    old = [rows.train(10), rows.train(20), rows.eval(20), rows.train(30), rows.train(40)]
    assert steps(path, "\n".join([*old, rows.train(15), rows.train(25), ""])) == [10, 15, 25]
    assert read_metrics(path).series("eval/loss", "eval").steps.tolist() == []


@pytest.mark.parametrize(
    "torn", ['{"kind": "train", "itera', '{"kind": "train", "iteration": 7, "train/lo', "\x00\x00"]
)
def test_a_torn_last_line_is_left_out_in_silence(path: Path, rows: Any, torn: str) -> None:
    assert steps(path, f"{rows.train(1)}\n{torn}") == [1]
    assert read_metrics(path).damaged == 0


def test_a_last_line_that_only_lacks_its_end_counts(path: Path, rows: Any) -> None:
    assert steps(path, f"{rows.train(1)}\n{rows.train(2)}") == [1, 2]


@pytest.mark.parametrize(
    "line", ["{", "[1, 2]", "7", '{"kind": "train"}', '{"kind": "note", "iteration": 3}', '{"iteration": 3}', "\\xff"]
)
def test_damaged_lines_are_counted(path: Path, rows: Any, line: str) -> None:
    assert steps(path, f"{rows.train(1)}\n{line}\n{rows.train(2)}\n") == [1, 2]
    assert read_metrics(path).damaged == 1


def test_lists_of_another_length_than_the_newest_are_left_out(path: Path, rows: Any) -> None:
    path.write_text("\n".join([rows.train(1, load=(1, 1)), rows.train(2), rows.train(3), ""]))
    frames = read_metrics(path).layer_frames(0, "load")
    assert frames is not None and frames.steps.tolist() == [2, 3]


def test_without_a_training_step_there_is_nothing_to_show(path: Path, rows: Any) -> None:
    with pytest.raises(ReportError, match=r"metrics\.jsonl: not there"):
        read_metrics(path)
    path.write_text(rows.eval(1) + "\n")
    with pytest.raises(ReportError, match="holds no training step yet"):
        read_metrics(path)


def test_metrics_are_read_without_torch() -> None:
    code = "import sys, moetrain.report.metrics_table; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
