"""Saves beside training, by whole trainers on two ranks: the bytes of a save in the foreground, failures that all ranks
see at the same step, and a stream of samples that no change of ranks or batch size can cut."""

from __future__ import annotations

import errno
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from parity import Layout, layout_of, tiny_config

from moetrain.checkpoint import CheckpointManager, CheckpointReader, StagedShare, TorchDistributed
from moetrain.checkpoint.files import Files
from moetrain.config.schema import RunConfig
from moetrain.errors import CheckpointError
from moetrain.runtime.groups import ParallelGroups, create_groups
from moetrain.testing import run_distributed
from moetrain.train.callback import Callback
from moetrain.train.data import RunData
from moetrain.train.metrics import Throughput
from moetrain.train.setup import build_step
from moetrain.train.trainer import Trainer

DP2, TP2 = Layout("dp2", 2), Layout("tp2", 2, tensor=2)


class Numbered:
    """Samples that are functions of their number, and a note of every number that was asked for."""

    def __init__(self, length: int, config: RunConfig, read: list[int]) -> None:
        self.length, self.config, self.read = length, config, read

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        self.read.append(index)
        model = self.config.model
        row = (index + torch.arange(model.seq_length + 1)) % model.vocab_size
        return {"tokens": row[:-1].clone(), "labels": row[1:].clone()}


class SlowDisk(Files):
    """So slow that the next steps are taken while it writes."""

    def sync(self, descriptor: int) -> None:
        time.sleep(0.3)
        super().sync(descriptor)


def slow_copy(share: StagedShare, finish: Callable[[StagedShare], None] = StagedShare.finish) -> None:
    """So slow that the next forward and backward passes are over before it begins."""
    time.sleep(0.5)
    finish(share)


class FullDisk(Files):
    """Full for the first `failures` shards of this rank."""

    def __init__(self, failures: int) -> None:
        self.failures = failures

    def create(self, path: Path) -> int:
        if path.name.startswith("shard-") and self.failures:
            self.failures -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().create(path)


class Notes(Callback):
    """What happened, in the order in which it was told."""

    def __init__(self, stop_at: int | None) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.steps_beside_a_save = 0
        self.stop_at = stop_at
        self.loss = self.seconds = float("nan")

    def on_step_end(self, trainer: Any, report: Any) -> None:
        self.loss, self.seconds = report.loss, report.step_seconds
        self.told.append(("step", report.iteration))
        if report.iteration == self.stop_at and trainer.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        self.steps_beside_a_save += not trainer.saver.is_over

    def on_checkpoint(self, trainer: Any, report: Any) -> None:
        self.told.append(("save", report.iteration, report.error is None, report.stall_seconds, report.nbytes))


def train(
    groups: ParallelGroups, layout: Layout, folder: Path, files: Files, stop_at: int | None = None, **changes: object
) -> tuple[Notes, list[int]]:
    """Train in `folder`; what was told, and the numbers of the samples that this rank read. At step `stop_at` rank 1
    gets a SIGTERM."""
    config = tiny_config(layout, run={"dir": str(folder)}, **changes)
    torch.manual_seed(1)
    step = build_step(config, groups, torch.device("cpu"))
    read: list[int] = []
    planned = config.training.train_iters * config.training.global_batch_size
    data = RunData(
        Numbered(planned, config, read), lambda samples: Numbered(samples, config, read), None, 0, "none", None
    )
    saving = dist.new_group(backend="gloo")
    assert isinstance(saving, dist.ProcessGroup)
    manager = CheckpointManager(folder / "checkpoints", 9, TorchDistributed(saving), files=files)
    notes = Notes(stop_at)
    log = logging.getLogger("test")
    try:
        Trainer(config, step, data, manager, [notes], Throughput(), log).fit()
    except CheckpointError as error:
        notes.told.append(("error", str(error)))
    return notes, read


def sums(folder: Path) -> dict[str, str]:
    """Of every shard file of every checkpoint."""
    return {
        f"{path.name}/{name}": file.sha256
        for path in sorted((folder / "checkpoints").glob("step-*"))
        for name, file in CheckpointReader(path).manifest.record.files.items()
    }


def observe(folder: Path) -> dict[str, Any]:
    groups = create_groups(layout_of(tiny_config(DP2)), seed=1)
    every_other = {"save_interval": 2, "keep_last": 9}

    def run(
        name: str, files: Files, checkpoint: dict[str, Any], stop_at: int | None = None, **training: int
    ) -> tuple[Notes, list[int]]:
        changes: dict[str, Any] = {f"training__{key}": value for key, value in training.items()}
        return train(groups, DP2, folder / name, files, stop_at, checkpoint=every_other | checkpoint, **changes)

    seen: dict[str, Any] = {}
    with patch.object(StagedShare, "finish", slow_copy):
        run("slow copy", Files(), {})
    beside, _ = run("async", SlowDisk(), {})
    seen["steps_beside"] = beside.steps_beside_a_save
    seen["async"] = beside.told
    seen["loss"] = beside.loss
    run("sync", Files(), {"async_save": False})
    dist.barrier()
    seen["told of itself"] = CheckpointReader(folder / "async" / "checkpoints" / "step-00000005").extra
    seen["sums"] = {name: sums(folder / name) for name in ("async", "slow copy", "sync")}
    on_rank_1 = dist.get_rank() == 1
    seen["forgiven"] = run("forgiven", FullDisk(2 if on_rank_1 else 0), {"max_failed_saves": 3})[0].told
    seen["given up"] = run("given-up", FullDisk(99 if on_rank_1 else 0), {"max_failed_saves": 2})[0].told
    seen["last"] = run("last", FullDisk(99 if on_rank_1 else 0), {"save_interval": 0})[0].told
    seen["stopped"] = run("stopped", SlowDisk(), {}, stop_at=3)[0].told
    seen["read"] = run("stream", Files(), {"save_interval": 3}, train_iters=9, stop_after=3)[1]
    seen["read later"] = run("stream", Files(), {}, train_iters=9, stop_after=5, global_batch_size=4)[1]
    return seen


def observe_on_another_layout(folder: Path) -> list[int]:
    """One data-parallel rank of two tensor-parallel ones goes on where two data-parallel ranks were, with a third batch
    size: it needs more samples than nine batches of that size."""
    groups = create_groups(layout_of(tiny_config(TP2)), seed=1)
    changes = {"training__train_iters": 9, "training__global_batch_size": 2}
    return train(groups, TP2, folder / "stream", Files(), **changes)[1]


def slow_sample(samples: Numbered, index: int, read: Callable[..., Any] = Numbered.__getitem__) -> dict:
    """From a disk so slow that it takes longer than the arithmetic."""
    time.sleep(0.05)
    return read(samples, index)


def observe_slow_samples(folder: Path) -> float:
    layout = Layout("one", 1)
    with patch.object(Numbered, "__getitem__", slow_sample):
        groups = create_groups(layout_of(tiny_config(layout)), seed=1)
        return train(groups, layout, folder, Files(), training__train_iters=2)[0].seconds


def test_the_seconds_of_a_step_include_the_reading_of_its_samples(tmp_path: Path) -> None:
    (seconds,) = run_distributed(observe_slow_samples, 1, tmp_path)
    assert seconds >= tiny_config(Layout("one", 1)).training.global_batch_size * 0.05


def test_saves_beside_training_are_those_in_the_foreground_and_fail_on_all_ranks_alike(tmp_path: Path) -> None:
    seen = run_distributed(observe, 2, tmp_path)
    first = seen[0]
    assert first["steps_beside"] > 0, "no step was taken beside a save, so this proves nothing"
    assert [told[1] for told in first["async"] if told[0] == "save"] == [2, 4, 5]
    assert len(first["sums"]["async"]) == 6, "three checkpoints of two ranks"
    assert first["sums"]["async"] == first["sums"]["slow copy"] == first["sums"]["sync"]
    assert first["told of itself"]["loss"] == first["loss"], "what a model card says of the last step"
    assert first["told of itself"]["versions"]["torch"] == torch.__version__

    def without_seconds(told: list) -> list:
        return [(*one[:3], *one[4:]) if one[0] == "save" else one for one in told]

    for what in ("async", "forgiven", "given up", "last", "stopped"):
        assert without_seconds(seen[1][what]) == without_seconds(first[what]), "the ranks were told different things"
    saves = [told[1:3] for told in first["forgiven"] if told[0] == "save"]
    assert saves == [(2, False), (4, False), (5, True)]
    assert first["given up"][-1][0] == "error" and "2 saves in a row failed" in first["given up"][-1][1]
    assert "rank 1: OSError: [Errno 28] No space left on device" in first["given up"][-1][1]
    assert first["last"][-1][0] == "error" and ("step", 5) in first["last"]
    stopped = [told[:3] for told in first["stopped"]]
    assert stopped[-2:] == [("save", 2, True), ("save", 3, True)], "a run that is asked to stop leaves with its saves"

    data_parallel = [sorted(seen[0][part] + seen[1][part]) for part in ("read", "read later")]
    assert data_parallel == [list(range(24)), list(range(24, 32))]
    for rank, numbers in enumerate(run_distributed(observe_on_another_layout, 2, tmp_path)):
        assert numbers == list(range(32, 40)), f"rank {rank}"
