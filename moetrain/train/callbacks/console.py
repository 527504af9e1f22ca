"""What a person sees: one line per log interval, and on a terminal a live bar below it."""

from __future__ import annotations

import sys
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from moetrain.train.callback import Callback, TrainerView, is_logged
from moetrain.train.metrics import EvalReport, SaveReport, StepReport, Throughput


class ConsoleCallback(Callback):
    """Prints progress on rank 0: lines that a person can read and a script can parse.

    On a terminal a rich bar with the pace and the time that remains stands below the lines; a file or a pipe gets the
    lines alone, each with the same figures. `stream` defaults to standard output.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._console: Console | None = None
        self._progress: Progress | None = None

    def on_train_start(self, trainer: TrainerView) -> None:
        if trainer.rank != 0:
            return
        stream = self._stream or sys.stdout
        # rich alone would take FORCE_COLOR for a terminal, and draw its bar into a CI log
        terminal = stream.isatty()
        console = Console(file=stream, force_terminal=terminal, highlight=False, markup=False, soft_wrap=True)
        self._console = console
        if trainer.start_iteration:
            self._print(f"resumed at step {trainer.start_iteration:,}")
        if console.is_terminal and not console.is_dumb_terminal:
            self._progress = _started_bar(console, trainer.config.training.train_iters, trainer.start_iteration)

    def on_step_end(self, trainer: TrainerView, report: StepReport) -> None:
        if self._console is None:
            return
        if report.skipped:
            self._print(
                f"step {report.iteration:,} skipped: gradient norm is {report.grad_norm} "
                f"({report.skipped_total:,} skipped so far)"
            )
        if is_logged(trainer, report):
            self._print(step_line(report, trainer.throughput))
        if self._progress is not None:
            pace = f"loss {report.loss:.3f}  " + "  ".join(pace_words(report, trainer.throughput))
            self._progress.update(self._progress.task_ids[0], completed=report.iteration, pace=pace)

    def on_evaluate(self, trainer: TrainerView, report: EvalReport) -> None:
        words = [f"eval at step {report.iteration:,}", f"loss {report.loss:.4f}"]
        words += [] if report.perplexity is None else [f"perplexity {report.perplexity:.2f}"]
        words += [] if report.unigram_entropy is None else [f"unigram {report.unigram_entropy:.3f}"]
        words += [f"{name} {value:.4f}" for name, value in report.scores.items()]
        self._print("  ".join([*words, f"{report.seconds:.1f} s"]))

    def on_checkpoint(self, trainer: TrainerView, report: SaveReport) -> None:
        if report.error is None:  # else the log has told it, on the same terminal
            words = [f"{report.nbytes / 1e9:.3f} GB in {report.write_seconds:.2f} s"]
            words.append(f"stall {report.stall_seconds:.3f} s")
            self._print("  ".join([f"saved {report.path}", *words]))

    def on_train_end(self, trainer: TrainerView) -> None:
        self._close()

    def on_error(self, trainer: TrainerView, exc: BaseException) -> None:
        self._close()

    def _print(self, line: str) -> None:
        if self._console is not None:
            self._console.print(line)
            self._console.file.flush()

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._console = None


def step_line(report: StepReport, throughput: Throughput) -> str:
    """`step 120/2,000  loss 3.412  load_balance 0.011  grad 0.83  lr 2.9e-04  412k tok/s  ...  eta 1h12m`"""
    words = [f"step {report.iteration:,}/{report.train_iters:,}", f"loss {report.loss:.4f}"]
    words += [f"{name} {value:.4g}" for name, value in report.aux.items()]
    words += [f"grad {report.grad_norm:.3g}", f"lr {report.lr:.2e}"]
    if report.router:
        words.append(f"max/mean load {max(stats.max_over_mean for stats in report.router):.2f}")
    return "  ".join(words + pace_words(report, throughput))


def pace_words(report: StepReport, throughput: Throughput) -> list[str]:
    """The rate, the utilization where the peak is known, and the time that remains."""
    words = []
    if (rate := throughput.tokens_per_second) is not None:
        words.append(f"{short_number(rate)} tok/s")
    if (flops := throughput.flops_per_second) is not None:
        words.append(f"{short_number(flops)}FLOP/s")
    if (mfu := throughput.mfu) is not None and throughput.peak is not None:
        words.append(f"{100 * mfu:.1f}% of {throughput.peak.source} peak")
    if (eta := throughput.eta_seconds(report.train_iters - report.iteration)) is not None:
        words.append(f"eta {short_time(eta)}")
    return words


def short_number(value: float) -> str:
    """Three digits and a metric letter: 412k, 1.05M, 31.4T."""
    for power, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * power:
            return f"{value / power:.3g}{letter}"
    return f"{value:.3g}"


def short_time(seconds: float) -> str:
    """The two leading units: 8s, 3m05s, 1h12m, 2d03h."""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    if minutes:
        return f"{minutes}m{whole % 60:02d}s"
    return f"{whole}s"


def _started_bar(console: Console, total: int, completed: int) -> Progress:
    columns = (BarColumn(bar_width=30), MofNCompleteColumn(), TextColumn("{task.fields[pace]}", markup=False))
    progress = Progress(*columns, console=console, refresh_per_second=4)
    progress.add_task("training", total=total, completed=completed, pace="")
    progress.start()
    return progress
