"""What a save costs: how long training stands still for it, how long it takes, and what the disk could do."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from moetrain.bench.machine import describe
from moetrain.bench.report import significant
from moetrain.bench.results import Machine, spread
from moetrain.checkpoint import BackgroundSaver, CheckpointManager, Piece, SingleProcess, Snapshot
from moetrain.errors import CheckpointError, ConfigError

MARK = "<!-- written by `moetrain bench checkpoint`; do not edit -->"
_TENSOR_BYTES = 8 * 2**20
HOW_TO_READ = (
    "One rank, fp32 tensors of 8 MiB. The ways take turns, with a sync of the file system before each; medians of the "
    "rounds, quartiles in brackets. A save in the background is followed by a pass: products of matrices on one "
    "thread, as long as the command says. Stall: how long the save holds up training, before the pass and between it "
    "and the update. First stall: of the first save, where the kernel also hands out the memory. Lost: by how much the "
    "pass with the save takes longer than a pass alone, which adds what the save's thread takes from the pass; it "
    "wants a processor that is free, and is noise where it is small. Without a pass: the stall where the update "
    "follows at once, which is the whole copy to host memory. Synchronous: a save that training waits for, with its "
    "checksums, syncs and commit, as in GB/s. Copy: the same bytes from a file in the page cache to a new file, and "
    "fsync."
)


@dataclass(frozen=True)
class SaveTimes:
    """Seconds by round, of so many bytes of state. `first_stall`: of the first save in the background. `lost`: of the
    pass beside a save, above one alone. `stall_without_pass`: where the update follows at once."""

    nbytes: int
    first_stall: float
    stall: list[float]
    lost: list[float]
    stall_without_pass: list[float]
    background: list[float]
    foreground: list[float]
    copy: list[float]


@dataclass(frozen=True)
class SaveReport:
    """All sizes on one machine."""

    machine: Machine
    command: str
    started: str
    load_before: float
    load_after: float
    times: list[SaveTimes]


class Pass:
    """Work of a fixed amount on one thread, in the place of a forward and backward pass."""

    def __init__(self, seconds: float) -> None:
        self._a, self._b = torch.rand(512, 512), torch.rand(512, 512)
        self._products = 1
        while (took := self.run()) < min(seconds, 0.1):
            self._products *= 2
        self._products = max(1, round(self._products * seconds / took))

    def run(self) -> float:
        """The seconds that it took."""
        begin = time.perf_counter()
        for _ in range(self._products):
            torch.mm(self._a, self._b)
        return time.perf_counter() - begin


def measure_saves(
    sizes: list[int], folder: Path, rounds: int, pass_seconds: float, tell: Callable[[str], None]
) -> list[SaveTimes]:
    """`sizes` in bytes. Works in a new folder below `folder`, which is removed.

    Raises:
        ConfigError: `folder` is none, or its disk has no room for four times the largest size.
    """
    if not folder.is_dir():
        raise ConfigError(f"--folder {folder}: not a folder")
    needed, free = 4 * max(sizes), shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(f"--folder {folder} has {free / 1e9:.1f} GB free; this needs {needed / 1e9:.1f} GB")
    times, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)  # as a rank of several on one machine has
    try:
        work = Pass(pass_seconds)
        for size in sizes:
            tell(f"{size / 1e6:.0f} MB")
            with _workplace(folder) as place:
                times.append(_measure(size, place, rounds, work))
    finally:
        torch.set_num_threads(threads)
    return times


@contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=".moetrain-bench-", dir=folder) as name:
        yield Path(name)


def _measure(size: int, place: Path, rounds: int, work: Pass) -> SaveTimes:
    count = max(1, round(size / _TENSOR_BYTES))
    rows = -(-size // (4 * count))
    tensors = [torch.rand(rows) for _ in range(count)]
    source = place / "source"
    with source.open("wb") as file:
        for tensor in tensors:
            file.write(tensor.numpy().data)
    saver = BackgroundSaver(CheckpointManager(place / "checkpoints", 1, SingleProcess()))
    first = _beside(work, saver, _snapshot(tensors, 1))[0]
    stall, lost, at_once, background, foreground, copy = [], [], [], [], [], []
    for number in range(rounds):
        step = 2 + 3 * number
        os.sync()
        copy.append(_copy(source, place / "copy"))
        os.sync()
        foreground.append(_seconds(saver.save(_snapshot(tensors, step)))[1])
        os.sync()
        alone = work.run()
        stalled, took, wrote = _beside(work, saver, _snapshot(tensors, step + 1))
        stall.append(stalled)
        lost.append(took - alone)
        background.append(wrote)
        os.sync()
        at_once.append(_beside(None, saver, _snapshot(tensors, step + 2))[0])
    return SaveTimes(sum(t.nbytes for t in tensors), first, stall, lost, at_once, background, foreground, copy)


def _snapshot(tensors: list[torch.Tensor], step: int) -> Snapshot:
    pieces = [
        Piece(f"weight.{number}", tuple(tensor.shape), (0,), tensor, steady=True)
        for number, tensor in enumerate(tensors)
    ]
    return Snapshot(step, 0, pieces, {}, {}, {})


def _beside(work: Pass | None, saver: BackgroundSaver, snapshot: Snapshot) -> tuple[float, float, float]:
    """(stall, until the update may begin, write)."""
    begin = time.perf_counter()
    saver.start(snapshot)
    if work is not None:
        work.run()
    saver.wait_until_copied()
    took = time.perf_counter() - begin
    stall, write = _seconds(saver.collect())
    return stall, took, write


def _seconds(outcome: Any) -> tuple[float, float]:
    """(stall, write)."""
    if outcome.error is not None:
        raise CheckpointError(str(outcome.error))
    return outcome.stall_seconds, outcome.write_seconds


def _copy(source: Path, target: Path) -> float:
    start = time.perf_counter()
    with source.open("rb") as reading, target.open("wb") as writing:
        shutil.copyfileobj(reading, writing, 4 * 2**20)
        writing.flush()
        os.fsync(writing.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def run(
    sizes: list[int], folder: Path, rounds: int, pass_seconds: float, command: str, tell: Callable[[str], None]
) -> SaveReport:
    """`measure_saves` and where and when that was."""
    started, load = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC", os.getloadavg()[0]
    times = measure_saves(sizes, folder, rounds, pass_seconds, tell)
    return SaveReport(describe("cpu"), command, started, load, os.getloadavg()[0], times)


def table(report: SaveReport, quartiles: bool = True) -> list[list[str]]:
    """Head and rows, as text."""
    head = ["state, MB", "stall, s", "first stall, s", "lost, s", "without a pass, s", "synchronous, s"]
    head += ["stall / synchronous", "in background, s", "save, GB/s", "copy, GB/s", "save / copy"]
    rows = []

    def text(seconds: list[float]) -> str:
        of = spread(seconds)
        return f"{of.median:.3f}" + (f" ({of.low:.3f}–{of.high:.3f})" if quartiles else "")

    for one in report.times:
        stall, save, copy = spread(one.stall).median, spread(one.foreground).median, spread(one.copy).median
        rows.append(
            [
                f"{one.nbytes / 1e6:.0f}",
                text(one.stall),
                significant(one.first_stall),
                text(one.lost),
                text(one.stall_without_pass),
                text(one.foreground),
                f"{stall / save:.1%}",
                text(one.background),
                significant(one.nbytes / save / 1e9),
                significant(one.nbytes / copy / 1e9),
                f"{copy / save:.0%}",
            ]
        )
    return [head, *rows]


def machine_lines(report: SaveReport) -> list[str]:
    """Where and when, and whether anything else went on."""
    machine = report.machine
    commit = f"; commit {machine.commit}" if machine.commit else ""
    lines = [
        f"{machine.name}; {machine.cores} cores; torch {machine.torch}{commit}",
        f"{report.started}; load average {report.load_before:.1f} before, {report.load_after:.1f} after",
    ]
    if report.load_before > machine.cores / 2:
        lines.append(
            "The machine was busy: what is lost, and copies in memory, suffer most; read the seconds as upper bounds"
        )
    return lines


def write(report: SaveReport, path: Path) -> None:
    """The page, whole or not at all."""
    head, *rows = table(report)
    lines = [head, ["---"] * len(head), *rows]
    parts = ["# Saves, measured", MARK, HOW_TO_READ, f"```\n{report.command}\n```"]
    parts.append("\n".join(f"- {line}" for line in machine_lines(report)))
    parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    whole = path.with_name(f".{path.name}.new")
    whole.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    whole.replace(path)


def to_json(report: SaveReport) -> dict[str, Any]:
    """Every time of every round."""
    return asdict(report)
