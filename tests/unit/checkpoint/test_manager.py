from __future__ import annotations

import logging
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from moetrain.checkpoint import CheckpointManager, CheckpointReader, Piece, SingleProcess
from moetrain.checkpoint.folders import commit, exclusive
from moetrain.errors import CheckpointError


def entries(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.name != ".lock")


def test_a_save_is_a_committed_folder_and_latest_names_it(manager, save_step):
    path = save_step(10)
    assert path == manager.root / "step-00000010"
    assert entries(manager.root) == ["latest", "step-00000010"]
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "shard-00000.safetensors"]
    assert (manager.root / "latest").read_text() == "step-00000010\n"
    reader = manager.open()
    assert (reader.step, reader.consumed_samples) == (10, 80)
    assert reader.read("controller.alpha").item() == 10.0


def test_an_empty_root_has_no_checkpoint(manager):
    assert manager.latest() is None
    assert manager.open() is None


def test_the_newest_keep_last_checkpoints_stay(manager, save_step):
    for step in (1, 2, 3, 4, 5):
        save_step(step)
    assert entries(manager.root) == ["latest", "step-00000003", "step-00000004", "step-00000005"]


def test_retention_counts_sound_checkpoints_only(tmp_path, save_step, manager):
    for step in (1, 2, 3):
        save_step(step)
    (manager.root / "step-00000003" / "shard-00000.safetensors").unlink()
    keep_two = CheckpointManager(manager.root, 2, SingleProcess())
    keep_two.save(4, 0, [Piece.whole("t", torch.ones(1))], {}, {}, {})
    assert entries(manager.root) == ["latest", "step-00000002", "step-00000003", "step-00000004"]


def test_a_save_never_deletes_itself_even_beside_newer_checkpoints(manager, save_step, caplog):
    for step in (7, 8, 9):
        save_step(step)
    CheckpointManager(manager.root, 1, SingleProcess()).save(5, 0, [Piece.whole("t", torch.ones(1))], {}, {}, {})
    assert "step-00000005" in entries(manager.root)
    assert (manager.root / "latest").read_text() == "step-00000005\n"
    assert "newer than the checkpoint just saved" in caplog.text


def test_a_sound_checkpoint_of_the_same_step_is_not_overwritten(manager, save_step):
    path = save_step(1)
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    with pytest.raises(CheckpointError, match="already is a complete checkpoint"):
        manager.save(1, 0, [Piece.whole("t", torch.zeros(1))], {}, {}, {})
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    assert entries(manager.root) == ["latest", "step-00000001"]


def test_a_damaged_checkpoint_of_the_same_step_is_set_aside_not_lost(manager, save_step, flip_bit):
    flip_bit(save_step(1) / "shard-00000.safetensors", -1)
    save_step(1)
    assert manager.open().step == 1
    aside = [name for name in entries(manager.root) if name.startswith("damaged-step-00000001-")]
    assert len(aside) == 1
    assert (manager.root / aside[0] / "shard-00000.safetensors").exists()


def test_a_flipped_bit_anywhere_is_noticed_and_the_previous_checkpoint_used(manager, save_step, flip_bit, caplog):
    save_step(1)
    newest = save_step(2)
    for file in sorted(newest.iterdir()):
        sound = file.read_bytes()
        for position in range(0, len(sound), max(1, len(sound) // 97)):
            flip_bit(file, position)
            assert manager.open().step == 1, f"bit flip at byte {position} of {file.name} went unnoticed"
            assert len(manager.skipped) == 1 and file.name in manager.skipped[0]
            file.write_bytes(sound)
    assert "passed over a damaged checkpoint, using step-00000001 instead" in caplog.text
    assert manager.open().step == 2
    assert manager.skipped == []


@pytest.mark.parametrize("name", ["manifest.json", "shard-00000.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "emptied", "longer"])
def test_a_file_of_the_wrong_length_is_noticed_and_the_previous_checkpoint_used(manager, save_step, name, damage):
    save_step(1)
    path = save_step(2) / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": data[:-1], "emptied": b"", "longer": data + b"\0"}[damage])
    assert manager.latest() == manager.root / "step-00000001"
    assert name in manager.skipped[0]
    assert manager.open().step == 1


def test_a_wrong_checksum_names_file_expected_and_found(manager, save_step, flip_bit):
    path = save_step(2)
    recorded = CheckpointReader(path).manifest.record.files["shard-00000.safetensors"].sha256
    flip_bit(path / "shard-00000.safetensors", -1)
    with pytest.raises(CheckpointError, match=f"shard-00000.safetensors: damaged: sha256 is [0-9a-f]+, .*{recorded}"):
        manager.open(path)


def test_only_damaged_checkpoints_are_an_error_rather_than_a_fresh_start(manager, save_step, flip_bit):
    for step in (1, 2):
        flip_bit(save_step(step) / "manifest.json", 5)
    for find in (manager.latest, manager.open):
        with pytest.raises(CheckpointError, match=r"no usable checkpoint: .*step-00000002.*step-00000001"):
            find()


def test_an_asked_for_folder_is_opened_or_refused_never_replaced(manager, save_step):
    first, second = save_step(1), save_step(2)
    assert manager.open(first).step == 1
    (second / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-00000002 is no checkpoint: .*manifest.json"):
        manager.open(second)


def test_a_failing_producer_leaves_nothing_behind(manager, save_step):
    save_step(1)

    def pieces():
        yield Piece.whole("t", torch.ones(3))
        raise RuntimeError("the accelerator fell off")

    with pytest.raises(CheckpointError, match="RuntimeError: the accelerator fell off") as caught:
        manager.save(2, 0, pieces(), {}, {}, {})
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert entries(manager.root) == ["latest", "step-00000001"]
    assert manager.open().step == 1


@contextmanager
def file_size_limit(size: int):
    """Writes beyond `size` fail with an OSError, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("limit", [0, 100, 4_000, 10_000])
def test_a_full_disk_at_any_point_leaves_the_older_checkpoints_alone(manager, save_step, limit):
    save_step(1)
    # Shard (4.1 kB) and manifest (10.7 kB): the limits hit the first byte, the header, the data, the manifest.
    pieces = [Piece.whole("t", torch.ones(1000))]
    with file_size_limit(limit), pytest.raises(CheckpointError, match="OSError"):
        manager.save(2, 0, pieces, {"long": "x" * 10_000}, {}, {})
    assert entries(manager.root) == ["latest", "step-00000001"]
    assert manager.open().step == 1
    manager.save(2, 0, pieces, {"long": "x" * 10_000}, {}, {})
    assert manager.open().step == 2


def test_remains_of_dead_saves_are_removed_by_the_next_save(manager, save_step):
    save_step(1)
    dead = manager.root / ".tmp-step-00000002-0badf00d"
    dead.mkdir()
    (dead / "shard-00000.safetensors").write_bytes(b"half")
    (manager.root / ".tmp-latest-0badf00d").write_text("step-000")
    assert manager.latest() == manager.root / "step-00000001"
    save_step(2)
    assert entries(manager.root) == ["latest", "step-00000001", "step-00000002"]


def test_a_live_save_of_another_process_is_respected(manager, save_step):
    save_step(1)
    alive = manager.root / ".tmp-step-00000002-a11fe000"
    alive.mkdir()
    with exclusive(manager.root), pytest.raises(CheckpointError, match="another process is saving here"):
        save_step(3)
    assert alive.is_dir()
    save_step(3)
    assert not alive.exists()


class PeerOnAnotherDisk(SingleProcess):
    """Gathers, besides our own record, that of a second rank whose files are not on this disk."""

    def gather_objects(self, value):
        mine = super().gather_objects(value)
        if not (isinstance(value, dict) and "files" in value):
            return mine
        shard = {"file": "shard-00001.safetensors", "key": "u@0", "offset": [0], "shape": [1]}
        tensors = {"u": {"dtype": "float32", "shape": [1], "shards": [shard]}}
        return [*mine, {"tensors": tensors, "files": {shard["file"]: {"bytes": 80, "sha256": "0" * 64}}}]


def test_a_rank_that_wrote_to_a_disk_of_its_own_is_noticed_before_the_commit(tmp_path):
    manager = CheckpointManager(tmp_path, 1, PeerOnAnotherDisk())
    with pytest.raises(CheckpointError, match=r"rank 0 does not see .*shard-00001.*must be on a shared disk"):
        manager.save(1, 0, [Piece.whole("t", torch.ones(1))], {}, {}, {})
    assert entries(tmp_path) == []


def test_a_commit_that_cannot_be_renamed_leaves_the_root_as_it_was(tmp_path):
    temporary, target = tmp_path / ".tmp-a", tmp_path / "step-00000001"
    temporary.mkdir()
    target.mkdir()
    (target / "something").write_text("")
    with pytest.raises(OSError, match="not empty"):
        commit(temporary, target, b"{}", "token")
    assert entries(tmp_path) == [".tmp-a", "step-00000001"]


def test_links_named_like_checkpoints_are_neither_used_nor_deleted(manager, save_step, tmp_path):
    save_step(1)
    elsewhere = tmp_path / "elsewhere"
    (manager.root / "step-00000001").rename(elsewhere)
    (manager.root / "step-00000001").symlink_to(elsewhere)
    for step in (2, 3, 4, 5):
        save_step(step)
    assert (elsewhere / "manifest.json").exists()
    assert manager.latest() == manager.root / "step-00000005"


def test_a_root_that_is_a_file_is_a_clear_error(tmp_path):
    root = tmp_path / "file"
    root.write_text("")
    with pytest.raises(CheckpointError, match="could not start saving"):
        CheckpointManager(root, 1, SingleProcess()).save(1, 0, [Piece.whole("t", torch.ones(1))], {}, {}, {})
    assert root.read_text() == ""


def test_warnings_are_logged_once_per_skipped_checkpoint(manager, save_step, flip_bit, caplog):
    save_step(1)
    flip_bit(save_step(2) / "shard-00000.safetensors", -1)
    with caplog.at_level(logging.WARNING):
        manager.open()
    assert [r.levelname for r in caplog.records].count("WARNING") == 1
