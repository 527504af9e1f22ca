"""A committed checkpoint is damaged in every file, in every way, at many places: it is always noticed, the one before
is used, and what is told names the file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moetrain.checkpoint import CheckpointManager, Piece, SingleProcess, find_step_folder
from moetrain.checkpoint.store import save_shard
from moetrain.errors import CheckpointError

FLIPS = 250  # of each file, spread over it; all of a smaller one


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1 and 2, in files of at most two pieces."""
    root = tmp_path_factory.mktemp("damage")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moetrain.checkpoint.manager.save_shard", _small_files)
        for step in (1, 2):
            pieces = [Piece("w", (8, 16), (row, 0), torch.full((1, 16), float(step))) for row in range(8)]
            pieces.append(Piece.whole("rng.0", torch.arange(64, dtype=torch.uint8)))
            CheckpointManager(root, 2, SingleProcess()).save(step, step, pieces, {"model": {}}, {}, {})
    return root


def _small_files(folder, rank, pieces, files):
    return save_shard(folder, rank, pieces, max_file_bytes=256, files=files)


def damages(data: bytes) -> Iterator[tuple[str, bytes | None]]:
    """What, and the file's bytes then; None when it is gone."""
    stride = max(1, len(data) // FLIPS)
    for position in {*range(0, len(data), stride), *range(16), *range(len(data) - 16, len(data)), len(data) // 2}:
        for bit in (0, 7):
            yield f"bit {bit} of byte {position}", _flipped(data, position, bit)
    for length in (0, 1, len(data) // 2, len(data) - 1):
        yield f"cut to {length} bytes", data[:length]
    yield "longer by a byte", data + b"\0"
    yield "zeroes from the middle on", data[: len(data) // 2] + bytes(len(data) - len(data) // 2)
    yield "gone", None


def _flipped(data: bytes, position: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 1 << bit
    return bytes(changed)


def test_every_damage_to_every_file_is_noticed_and_the_checkpoint_before_is_used(root):
    manager, points = CheckpointManager(root, 2, SingleProcess()), 0
    files = sorted((root / "step-00000002").iterdir())
    assert len(files) >= 4
    for path in files:
        sound = path.read_bytes()
        for what, data in damages(sound):
            if data is None:
                path.unlink()
            else:
                path.write_bytes(data)
            reader = manager.open()
            assert reader is not None and reader.step == 1, f"{path.name}, {what}: unnoticed"
            assert len(manager.skipped) == 1 and path.name in manager.skipped[0], (what, manager.skipped)
            points += 1
        path.write_bytes(sound)
    print(f"{points} points of damage, {len(files)} files")
    assert points > 1500
    reader = manager.open()
    assert reader is not None and reader.step == 2 and manager.skipped == []


@pytest.mark.parametrize("content", [None, b"", b"step-0000", b"step-00000009\n", b"../elsewhere\n", b"\xff\0" * 500])
def test_a_damaged_latest_changes_no_resume_and_misleads_nobody(root, content):
    pointer = root / "latest"
    sound = pointer.read_bytes()
    try:
        pointer.unlink() if content is None else pointer.write_bytes(content)
        manager = CheckpointManager(root, 2, SingleProcess())
        reader = manager.open()
        assert reader is not None and reader.step == 2 and manager.skipped == []
        assert manager.latest() == root / "step-00000002"
        with pytest.raises(CheckpointError):  # who asks for what `latest` names is told, not given something else
            find_step_folder(root)
    finally:
        pointer.write_bytes(sound)


def test_a_latest_that_names_an_older_checkpoint_changes_no_resume(root):
    sound = (root / "latest").read_bytes()
    (root / "latest").write_text("step-00000001\n")
    try:
        assert CheckpointManager(root, 2, SingleProcess()).latest() == root / "step-00000002"
        assert find_step_folder(root).name == "step-00000001"
    finally:
        (root / "latest").write_bytes(sound)
