"""What a failed save means for a run."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

import pytest
import torch

from moetrain.checkpoint import CheckpointManager, Piece, SingleProcess, Snapshot
from moetrain.checkpoint.files import Files
from moetrain.config.schema import CheckpointConfig
from moetrain.errors import CheckpointError
from moetrain.train.metrics import SaveReport
from moetrain.train.saving import RunSaver


class MoodyDisk(Files):
    """Full while `is_full`."""

    is_full = False

    def create(self, path: Path) -> int:
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().create(path)


@pytest.fixture(params=[True, False], ids=["async", "sync"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[RunSaver, MoodyDisk, list[SaveReport]]:
    disk, told = MoodyDisk(), []
    config = CheckpointConfig(async_save=request.param, max_failed_saves=3)
    manager = CheckpointManager(tmp_path, 9, SingleProcess(), files=disk)
    return RunSaver(manager, config, logging.getLogger("moetrain.test"), told.append), disk, told


def snapshot(step: int) -> Snapshot:
    return Snapshot(step, step, [Piece.whole("w", torch.full((3,), float(step)))], {}, {}, {})


def save(saver: RunSaver, step: int) -> None:
    saver.save(snapshot(step))
    saver.settle()


def test_failures_are_told_and_forgiven_until_there_are_too_many_in_a_row(run, caplog):
    saver, disk, told = run
    save(saver, 1)
    disk.is_full = True
    with caplog.at_level(logging.ERROR):
        save(saver, 2)
        save(saver, 3)
    assert "no checkpoint of iteration 2" in caplog.text and "No space left on device" in caplog.text
    disk.is_full = False
    save(saver, 4)
    disk.is_full = True
    save(saver, 5)
    save(saver, 6)
    with pytest.raises(
        CheckpointError, match=r"3 saves in a row failed .*max_failed_saves.* at iteration 7: .*No space"
    ):
        save(saver, 7)
    assert [(one.iteration, one.failed_in_a_row) for one in told] == [
        (1, 0), (2, 1), (3, 2), (4, 0), (5, 1), (6, 2), (7, 3),
    ]  # fmt: skip
    assert [one.error is None for one in told] == [True, False, False, True, False, False, False]
    assert told[0].nbytes > 0 and told[1].nbytes == 0 and told[0].stall_seconds > 0


def test_the_last_save_must_not_fail(run):
    saver, disk, told = run
    disk.is_full = True
    with pytest.raises(CheckpointError, match="No space left on device"):
        saver.save_last(snapshot(1))
    assert told[-1].error is not None


def test_the_last_save_takes_the_one_in_flight_or_makes_good_for_its_failure(run, tmp_path):
    saver, disk, told = run
    saver.save(snapshot(1))
    saver.save_last(snapshot(1))
    assert [(one.iteration, one.error) for one in told] == [(1, None)]
    disk.is_full = True
    saver.save(snapshot(2))
    while not saver.is_over:
        pass
    disk.is_full = False
    saver.save_last(snapshot(2))
    assert [(one.iteration, one.error is None) for one in told[1:]] == [(2, False), (2, True)]
    assert (tmp_path / "step-00000002" / "manifest.json").is_file()


def test_a_step_is_saved_once(run):
    saver, _, told = run
    save(saver, 1)
    save(saver, 1)
    saver.save_last(snapshot(1))
    assert len(told) == 1


def test_a_new_save_waits_for_the_one_before(run):
    saver, _, told = run
    saver.save(snapshot(1))
    saver.save(snapshot(2))
    assert [one.iteration for one in told][:1] == [1]
    saver.settle()
    assert [one.iteration for one in told] == [1, 2]


def test_a_dying_run_finishes_the_save_in_flight_and_raises_nothing(run, tmp_path, caplog):
    saver, disk, _ = run
    saver.save(snapshot(1))
    saver.rescue()
    assert (tmp_path / "step-00000001" / "manifest.json").is_file()
    disk.is_full = True
    saver.save(snapshot(2))
    saver.rescue()
    saver.rescue()
    assert "No space left on device" in caplog.text
