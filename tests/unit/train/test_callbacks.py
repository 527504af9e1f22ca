from __future__ import annotations

import gc
import io
import json
import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moetrain.train.callback import Callback, is_logged
from moetrain.train.callbacks import (
    ConsoleCallback,
    GarbageCallback,
    JsonlCallback,
    SummaryCallback,
    TensorBoardCallback,
    standard_callbacks,
)
from moetrain.train.callbacks.console import short_number, short_time
from moetrain.train.callbacks.jsonl import drop_rows_beyond
from moetrain.train.callbacks.records import to_json
from moetrain.train.metrics import EvalReport, SaveReport

EVALUATION = EvalReport(6, 2.0, math.exp(2.0), 5.5, 1.5)


def train(callbacks: list[Callback], view, report, until: int = 6, changes: dict | None = None) -> None:
    """A run from `view.start_iteration` to `until`, as the trainer would drive it."""
    for callback in callbacks:
        callback.on_train_start(view)
    for iteration in range(view.start_iteration + 1, until + 1):
        step = report(iteration, **(changes or {}))
        view.throughput.update(step.tokens, step.step_seconds)
        for callback in callbacks:
            callback.on_step_end(view, step)
    for callback in callbacks:
        callback.on_evaluate(view, replace(EVALUATION, iteration=until))
        callback.on_checkpoint(view, saved(view.run_dir / "checkpoints" / f"step-{until:08d}", until))
        callback.on_train_end(view)


def saved(path: Path, iteration: int, error: str | None = None) -> SaveReport:
    return SaveReport(iteration, path, error, 0.25, 1.5, 0 if error else 2_000_000, 1 if error else 0)


def rows(run_dir: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_the_first_step_the_last_and_every_interval_are_logged(view, report) -> None:
    view.train_iters, view.stop_after = 9, 7
    assert [i for i in range(1, 10) if is_logged(view, report(i))] == [1, 2, 4, 6, 7, 8, 9]


def test_only_rank_0_writes(view, report) -> None:
    view.rank = 1
    train([*standard_callbacks(), ConsoleCallback(stream := io.StringIO())], view, report)
    assert list(view.run_dir.iterdir()) == []
    assert stream.getvalue() == ""


# --- metrics.jsonl ---------------------------------------------------------------------------------------------------


def test_each_logged_step_and_validation_is_a_row(view, report) -> None:
    train([JsonlCallback()], view, report)
    assert [(row["kind"], row["iteration"]) for row in rows(view.run_dir)] == [
        *(("train", i) for i in (1, 2, 4, 6)),
        ("eval", 6),
        ("checkpoint", 6),
    ]
    assert rows(view.run_dir)[-1] == {
        "kind": "checkpoint",
        "iteration": 6,
        "checkpoint/stall_seconds": 0.25,
        "checkpoint/write_seconds": 1.5,
        "checkpoint/bytes": 2_000_000,
        "checkpoint/failed_in_a_row": 0,
        "checkpoint/error": None,
    }
    row = rows(view.run_dir)[1]
    assert row["train/loss"] == 2.0
    assert row["perf/tokens_per_second"] == pytest.approx(4000)
    assert row["router/layer03/load"] == [0.75, 0.25, 0.0, 0.0]


def test_a_row_is_on_disk_before_the_next_step(view, report) -> None:
    callback = JsonlCallback()
    callback.on_train_start(view)
    callback.on_step_end(view, report(1))
    assert len(rows(view.run_dir)) == 1
    callback.on_error(view, RuntimeError("lost a peer"))


def test_a_resumed_run_writes_every_step_once_even_after_a_torn_line(view, report) -> None:
    train([JsonlCallback()], view, report, until=5)
    with (view.run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "iterat')
    view.start_iteration = 3
    train([JsonlCallback()], view, report, changes={"loss": 9.0})
    steps = [(row["iteration"], row["train/loss"]) for row in rows(view.run_dir) if row["kind"] == "train"]
    assert steps == [(1, 4.0), (2, 2.0), (4, 9.0), (6, 9.0)]


def test_a_run_that_was_finished_and_is_started_again_has_one_row_of_its_last_validation(view, report) -> None:
    train([JsonlCallback()], view, report)
    view.start_iteration = 6
    again = JsonlCallback()
    again.on_train_start(view)
    again.on_evaluate(view, replace(EVALUATION, loss=1.5))
    again.on_train_end(view)
    told = [(row["kind"], row["iteration"]) for row in rows(view.run_dir)]
    assert sorted(told) == sorted(set(told))
    assert [row["eval/loss"] for row in rows(view.run_dir) if row["kind"] == "eval"] == [1.5]


def test_a_damaged_line_in_the_middle_is_dropped_with_a_warning(view, caplog: pytest.LogCaptureFixture) -> None:
    path = view.run_dir / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n{"iterat\n[]\n{"iteration": 2}\n')
    with caplog.at_level(logging.WARNING):
        drop_rows_beyond(path, 9, view.log)
    assert path.read_text() == '{"iteration": 1}\n{"iteration": 2}\n'
    assert "dropped 2 damaged line(s)" in caplog.text
    assert [entry.name for entry in view.run_dir.iterdir()] == ["metrics.jsonl"]


def test_a_torn_last_line_is_dropped_without_noise(view, caplog: pytest.LogCaptureFixture) -> None:
    path = view.run_dir / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n{"iteration": 2}')
    drop_rows_beyond(path, 9, view.log)
    assert path.read_text() == '{"iteration": 1}\n'
    assert caplog.text == ""


def test_a_whole_file_is_not_touched(view) -> None:
    path = view.run_dir / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n')
    before = path.stat().st_ino
    drop_rows_beyond(path, 1, view.log)
    assert path.stat().st_ino == before


def test_numbers_that_json_lacks_are_written_legally(view, report) -> None:
    train([JsonlCallback()], view, report, until=1, changes={"loss": math.nan, "grad_norm": math.inf})
    row = rows(view.run_dir)[0]
    assert (row["train/loss"], row["train/grad_norm"]) == (None, "Infinity")
    assert to_json({"a": [-math.inf, (1.5, math.nan)]}) == '{"a": ["-Infinity", [1.5, null]]}'


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def events(run_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(run_dir / "tensorboard")).Reload()


def test_tensorboard_reads_scalars_and_histograms_back(view, report) -> None:
    train([TensorBoardCallback()], view, report)
    read = events(view.run_dir)
    assert [(e.step, e.value) for e in read.Scalars("train/loss")] == [
        (1, 4.0), (2, 2.0), (4, 1.0), (6, pytest.approx(4 / 6)),
    ]  # fmt: skip
    assert [e.value for e in read.Scalars("eval/loss")] == [2.0]
    bars = read.Histograms("router/layer03/k_histogram")[0].histogram_value
    assert (list(bars.bucket), list(bars.bucket_limit)) == ([0.0, 4.0, 2.0], [0.5, 1.5, 2.5])


def test_a_resumed_run_hides_the_steps_after_its_checkpoint(view, report) -> None:
    train([TensorBoardCallback()], view, report, until=6)
    view.start_iteration = 3
    train([TensorBoardCallback()], view, report, changes={"loss": 9.0})
    read = events(view.run_dir)
    assert [(e.step, e.value) for e in read.Scalars("train/loss")] == [(1, 4.0), (2, 2.0), (4, 9.0), (6, 9.0)]


# --- summary.json, console, garbage ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("until", "outcome"), [(6, "finished"), (4, "stopped")])
def test_the_summary_tells_how_the_run_ended(view, report, until: int, outcome: str) -> None:
    train([SummaryCallback()], view, report, until=until)
    summary = json.loads((view.run_dir / "summary.json").read_text())
    assert summary["outcome"] == outcome
    assert (summary["iteration"], summary["first_loss"], summary["last_loss"]) == (until, 4.0, 4.0 / until)
    assert summary["eval_loss"] == 2.0
    assert summary["checkpoint"] == f"step-{until:08d}"
    assert summary["error"] is None


def test_the_summary_of_a_failed_run_names_the_error(view, report) -> None:
    callback = SummaryCallback()
    callback.on_train_start(view)
    callback.on_error(view, RuntimeError("lost a peer"))
    summary = json.loads((view.run_dir / "summary.json").read_text())
    assert (summary["outcome"], summary["error"]) == ("failed", "RuntimeError: lost a peer")


def test_a_log_file_gets_plain_lines_with_pace_and_time_left(view, report) -> None:
    stream = io.StringIO()
    train([ConsoleCallback(stream)], view, report)
    lines = stream.getvalue().splitlines()
    assert lines[1] == (
        "step 2/6  loss 2.0000  load_balance 0.01  grad 0.5  lr 1.00e-03  max/mean load 3.00  "
        "4k tok/s  4GFLOP/s  20.0% of known peak  eta 1s"
    )
    assert len(lines) == 6
    assert lines[4].startswith("eval at step 6  loss 2.0000  perplexity 7.39  unigram 5.500")
    assert "\x1b" not in stream.getvalue()


def test_a_forced_color_does_not_put_a_bar_into_a_log_file(view, report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    train([ConsoleCallback(stream := io.StringIO())], view, report)
    assert "\x1b" not in stream.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_the_same_lines_and_a_live_bar(view, report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    view.start_iteration = 3
    train([ConsoleCallback(stream := Terminal())], view, report)
    text = stream.getvalue()
    assert "resumed at step 3" in text
    assert "step 4/6  loss 1.0000" in text
    assert "6/6" in text
    assert "\x1b[" in text
    assert text.endswith("\x1b[?25h"), "the cursor is given back"


def test_a_skipped_step_is_told_at_once(view, report) -> None:
    callback = ConsoleCallback(stream := io.StringIO())
    callback.on_train_start(view)
    callback.on_step_end(view, report(3, skipped=True, skipped_total=2, grad_norm=math.inf))
    assert stream.getvalue() == "step 3 skipped: gradient norm is inf (2 skipped so far)\n"


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (999.6, "1k"), (411_900, "412k"), (1.05e6, "1.05M"), (3.14e13, "31.4T")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert short_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.6, "8s"), (59.7, "1m00s"), (185, "3m05s"), (4320, "1h12m"), (183_600, "2d03h")]
)
def test_times_are_short(seconds: float, text: str) -> None:
    assert short_time(seconds) == text


def test_what_lives_after_the_first_step_is_frozen_until_the_end(view, report) -> None:
    callback = GarbageCallback()
    callback.on_step_end(view, report(1))
    frozen = gc.get_freeze_count()
    callback.on_step_end(view, report(2))
    assert frozen > 0
    assert gc.get_freeze_count() == frozen
    callback.on_train_end(view)
    assert gc.get_freeze_count() == 0
