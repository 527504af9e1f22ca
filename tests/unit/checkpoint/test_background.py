"""Saves in a thread: the state of the moment, one at a time, and the errors of a save in the foreground."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moetrain.checkpoint import (
    BackgroundSaver,
    CheckpointManager,
    CheckpointReader,
    Piece,
    SingleProcess,
    Snapshot,
    StagedShare,
    StagingBuffer,
)
from moetrain.errors import CheckpointError

from .faults import WatchedFiles, failing_files, full_disk

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]


def snapshot(step: int, tensor: torch.Tensor, name: str = "w") -> Snapshot:
    return Snapshot(step, step * 2, [Piece.whole(name, tensor)], {}, {}, {})


def paused_files(go: threading.Event) -> WatchedFiles:
    """Nothing is written before `go`."""

    def watch(number, name, arguments, call):
        if name == "create":
            assert go.wait(30)
        return call()

    return WatchedFiles(watch)


def test_a_staged_piece_is_what_it_was_when_it_was_staged():
    values = [torch.randint(0, 2, (5, 3)).to(dtype) for dtype in DTYPES] + [torch.tensor(1.5), torch.empty(0, 4)]
    pieces = [replace(Piece.whole(f"t{number}", value), steady=number % 2 == 0) for number, value in enumerate(values)]
    before = [value.clone() for value in values]
    share = StagingBuffer().stage(iter(pieces))
    for value, piece in zip(values, pieces, strict=True):
        if not piece.steady:
            value.zero_()
    share.finish()
    for value in values:
        value.zero_()
    for piece, old in zip(share.pieces, before, strict=True):
        assert piece.tensor.dtype == old.dtype and piece.tensor.shape == old.shape
        assert torch.equal(piece.tensor.reshape(-1).view(torch.uint8), old.reshape(-1).view(torch.uint8))
    assert [piece.name for piece in share.pieces] == [piece.name for piece in pieces]


def test_the_buffer_is_used_again_and_no_larger_than_the_state():
    buffer, state = StagingBuffer(), torch.ones(1000)
    first = buffer.stage([Piece.whole("w", state)]).pieces[0].tensor.data_ptr()
    assert buffer.nbytes == 4032  # whole cache lines
    assert buffer.stage([Piece.whole("w", state[:10])]).pieces[0].tensor.data_ptr() == first
    assert buffer.nbytes == 4032


def test_training_goes_on_and_the_state_of_the_step_is_saved(tmp_path):
    go, state = threading.Event(), torch.arange(100.0)
    saver = BackgroundSaver(CheckpointManager(tmp_path, 2, SingleProcess(), files=paused_files(go)))
    assert saver.is_idle and saver.is_over
    saver.start(snapshot(1, state))
    assert not saver.is_idle and not saver.is_over
    assert saver.collect(timeout=0.0) is None
    state += 1000.0
    go.set()
    outcome = saver.collect()
    assert outcome is not None and outcome.error is None and saver.is_idle
    with CheckpointReader(outcome.path) as reader:
        assert torch.equal(reader.read("w"), torch.arange(100.0))
        assert reader.consumed_samples == 2
    assert outcome.nbytes == (outcome.path / "shard-00000.safetensors").stat().st_size
    assert 0 < outcome.stall_seconds < outcome.write_seconds


def test_steady_pieces_are_copied_beside_training_which_waits_for_them_before_the_update(tmp_path, monkeypatch):
    go, finish = threading.Event(), StagedShare.finish

    def slow(share: StagedShare) -> None:
        assert go.wait(30)
        time.sleep(0.1)
        finish(share)

    monkeypatch.setattr(StagedShare, "finish", slow)
    steady, other = torch.arange(100.0), torch.arange(10.0)
    saver = BackgroundSaver(CheckpointManager(tmp_path, 2, SingleProcess()))
    saver.wait_until_copied()  # nothing was started: at once
    pieces = [replace(Piece.whole("steady", steady), steady=True), Piece.whole("other", other)]
    saver.start(Snapshot(1, 2, pieces, {}, {}, {}))
    other += 1000.0  # as a forward pass may
    go.set()
    saver.wait_until_copied()
    steady += 1000.0  # as an update does
    outcome = saver.collect()
    assert outcome is not None and outcome.error is None and outcome.stall_seconds >= 0.1
    with CheckpointReader(outcome.path) as reader:
        assert torch.equal(reader.read("steady"), torch.arange(100.0))
        assert torch.equal(reader.read("other"), torch.arange(10.0))


def test_a_copy_that_fails_beside_training_fails_the_save_and_lets_the_update_go_on(tmp_path, monkeypatch):
    def fail(share: StagedShare) -> None:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(StagedShare, "finish", fail)
    saver = BackgroundSaver(CheckpointManager(tmp_path, 2, SingleProcess()))
    saver.start(snapshot(1, torch.ones(5)))
    saver.wait_until_copied()
    outcome = saver.collect()
    assert outcome is not None and "an illegal memory access" in str(outcome.error)


def test_background_and_foreground_write_the_same_bytes(tmp_path):
    files = []
    for name in ("background", "foreground"):
        saver = BackgroundSaver(CheckpointManager(tmp_path / name, 2, SingleProcess()))
        state = torch.linspace(0, 1, 777)
        if name == "background":
            saver.start(snapshot(3, state))
            outcome = saver.collect()
        else:
            outcome = saver.save(snapshot(3, state))
            assert outcome.stall_seconds == outcome.write_seconds
        assert outcome is not None and outcome.error is None
        files.append({path.name: path.read_bytes() for path in outcome.path.iterdir()})
    assert files[0] == files[1]


def test_two_saves_at_once_are_a_mistake_of_ours(tmp_path):
    go = threading.Event()
    saver = BackgroundSaver(CheckpointManager(tmp_path, 2, SingleProcess(), files=paused_files(go)))
    saver.start(snapshot(1, torch.ones(1)))
    with pytest.raises(AssertionError, match="was not collected"):
        saver.start(snapshot(2, torch.ones(1)))
    go.set()
    saver.collect()


def test_a_save_that_fails_says_why_and_the_next_one_works(tmp_path):
    manager = CheckpointManager(tmp_path, 2, SingleProcess(), files=failing_files(6, full_disk, forever=True))
    saver = BackgroundSaver(manager)
    saver.start(snapshot(1, torch.ones(5)))
    outcome = saver.collect()
    assert outcome is not None and isinstance(outcome.error, CheckpointError) and outcome.nbytes == 0
    assert "No space left on device" in str(outcome.error)
    manager.files = failing_files(0, full_disk)
    saver.start(snapshot(2, torch.ones(5)))
    outcome = saver.collect()
    assert outcome is not None and outcome.error is None


def test_a_state_that_cannot_be_copied_fails_the_save_and_not_the_training(tmp_path: Path):
    def pieces():
        yield Piece.whole("w", torch.ones(1))
        raise RuntimeError("out of page-locked memory")

    saver = BackgroundSaver(CheckpointManager(tmp_path, 2, SingleProcess()))
    saver.start(Snapshot(1, 1, pieces(), {}, {}, {}))
    outcome = saver.collect()
    assert outcome is not None and "out of page-locked memory" in str(outcome.error)


def test_what_is_no_checkpoint_error_is_raised_where_it_is_waited_for(tmp_path):
    class PeerIsGone(SingleProcess):
        def broadcast_object(self, value):
            raise ConnectionError("connection closed by peer")

    saver = BackgroundSaver(CheckpointManager(tmp_path, 2, PeerIsGone()))
    saver.start(snapshot(1, torch.ones(1)))
    with pytest.raises(ConnectionError, match="closed by peer"):
        saver.collect()
    assert saver.is_idle
