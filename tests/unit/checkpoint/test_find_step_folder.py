from __future__ import annotations

import pytest

from moetrain.checkpoint import find_step_folder
from moetrain.errors import CheckpointError


def test_a_run_its_checkpoints_and_a_step_are_all_understood(manager, save_step):
    older, newest = save_step(10), save_step(20)
    for path in (manager.root.parent, manager.root, newest):
        assert find_step_folder(path) == newest
        assert manager.open(path).step == 20
    assert find_step_folder(older) == older
    assert manager.open(older).step == 10


@pytest.mark.parametrize("pointer", ["../../elsewhere", "step-00000099", "", "step-1/../../x", "\x00" * 50])
def test_a_pointer_to_anything_but_a_complete_step_is_refused(tmp_path, pointer):
    (tmp_path / "latest").write_text(pointer)
    with pytest.raises(CheckpointError, match="latest"):
        find_step_folder(tmp_path)


def test_a_path_without_checkpoint_is_refused(tmp_path, manager):
    for open_path in (find_step_folder, manager.open):
        with pytest.raises(CheckpointError, match="is no checkpoint"):
            open_path(tmp_path / "missing")


def test_a_damaged_checkpoint_that_was_asked_for_is_refused_even_beside_a_sound_one(manager, save_step, flip_bit):
    save_step(10)
    flip_bit(save_step(20) / "shard-00000.safetensors", -1)
    with pytest.raises(CheckpointError, match="sha256"):
        manager.open(manager.root)
    assert manager.open().step == 10
