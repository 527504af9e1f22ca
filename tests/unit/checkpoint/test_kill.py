"""kill -9 at random moments of a save."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import torch

from moetrain.checkpoint import CheckpointManager, CheckpointReader, Piece, SingleProcess
from moetrain.checkpoint.folders import step_folders

KILLS = 12
NUMEL = 1_000_000


def _save(manager: CheckpointManager, step: int) -> None:
    pieces = [Piece("w", (4, NUMEL // 4), (i, 0), torch.full((1, NUMEL // 4), float(step))) for i in range(4)]
    manager.save(step, step, pieces, {}, {}, {})


def _save_forever(root: Path, started) -> None:
    torch.set_num_threads(1)
    manager = CheckpointManager(root, keep_last=2, comm=SingleProcess())
    latest = manager.latest()
    step = 1 if latest is None else int(latest.name.removeprefix("step-")) + 1
    started.set()
    while True:
        _save(manager, step)
        step += 1


def _seconds_per_save(root: Path) -> float:
    manager = CheckpointManager(root, keep_last=2, comm=SingleProcess())
    begin = time.perf_counter()
    for step in range(1, 4):
        _save(manager, step)
    return (time.perf_counter() - begin) / 3


def test_after_a_kill_at_any_moment_the_newest_checkpoint_is_whole(tmp_path):
    root = tmp_path / "checkpoints"
    context = multiprocessing.get_context("fork")
    rng = random.Random(0)
    patience = 2.5 * _seconds_per_save(tmp_path / "timing")
    newest, interrupted = 0, 0
    for _ in range(KILLS):
        started = context.Event()
        process = context.Process(target=_save_forever, args=(root, started))
        process.start()
        assert started.wait(30)
        time.sleep(rng.uniform(0.0, patience))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)
        assert process.exitcode == -signal.SIGKILL, "the saver ended by itself, so it failed"
        interrupted += any(root.glob(".tmp-step-*"))
        for step, folder in step_folders(root):
            with CheckpointReader(folder, verify="full") as reader:
                assert (reader.read("w") == float(step)).all()
        latest = CheckpointManager(root, 2, SingleProcess()).latest()
        step = 0 if latest is None else int(latest.name.removeprefix("step-"))
        assert step >= newest, "a committed checkpoint was lost"
        newest = step
    assert newest > 0, "no save ever finished, so the test proves nothing"
    assert interrupted > KILLS // 4, "the kills missed the saves, so the test proves nothing"
