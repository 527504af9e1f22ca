"""Which checkpoints stay."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from moetrain.checkpoint import CheckpointManager, CheckpointReader, Piece, Retention, SingleProcess
from moetrain.checkpoint.retention import Saved, Survey, ranked


def saved(*steps: int, losses: dict[int, float] | None = None) -> list[Saved]:
    return [Saved(step, Path(f"step-{step:08d}"), (losses or {}).get(step)) for step in steps]


def kept(rules: Retention, all_of_them: list[Saved], *named: int) -> list[int]:
    gone = {one.step for one in rules.doomed(all_of_them, [f"step-{step:08d}" for step in named])}
    return [one.step for one in all_of_them if one.step not in gone]


@pytest.mark.parametrize(
    ("rules", "stay"),
    [
        (Retention(1), [50]),
        (Retention(3), [30, 40, 50]),
        (Retention(9), [10, 20, 30, 40, 50]),
        (Retention(1, every=20), [20, 40, 50]),
        (Retention(2, every=30), [30, 40, 50]),
        (Retention(1, best=1), [20, 50]),
        (Retention(1, best=2), [20, 40, 50]),
        (Retention(1, every=30, best=1), [20, 30, 50]),
    ],
)
def test_what_one_rule_keeps_stays(rules, stay):
    losses = {10: 3.0, 20: 1.0, 40: 1.5, 50: 2.0}  # 30 was not validated
    assert kept(rules, saved(10, 20, 30, 40, 50, losses=losses)) == stay


def test_of_equal_losses_the_newest_is_the_best():
    assert [one.step for one in ranked(saved(10, 20, 30, losses={10: 1.0, 20: 1.0, 30: 2.0}))] == [20, 10, 30]


def test_what_a_pointer_names_stays():
    assert kept(Retention(1), saved(10, 20, 30), 10) == [10, 30]


def test_the_oldest_go_first_and_the_newest_never():
    for last, every, best in itertools.product((1, 2), (None, 7), (0, 1)):
        everything = saved(*range(1, 40), losses={step: 1.0 / step for step in range(1, 20)})
        doomed = [one.step for one in Retention(last, every, best).doomed(everything)]
        assert doomed == sorted(doomed) and 39 not in doomed


@pytest.mark.parametrize("bad", [{"last": 0}, {"last": 1, "every": 0}, {"last": 1, "best": -1}])
def test_rules_that_keep_less_than_nothing_are_refused(bad):
    with pytest.raises(ValueError, match="keep_"):
        Retention(**bad)


def save(root: Path, step: int, loss: float | None, at: int | None = None) -> None:
    extra = {} if loss is None else {"evaluation": {"iteration": step if at is None else at, "loss": loss}}
    manager = CheckpointManager(root, 1, SingleProcess(), keep_every=4, keep_best=1)
    manager.save(step, 0, [Piece.whole("t", torch.ones(1))], {}, {}, extra)


def test_saves_follow_all_three_rules_and_name_the_best(tmp_path):
    for step, loss in enumerate((5.0, 2.0, 3.0, 4.0, 3.5, 1.0, 6.0), start=1):
        save(tmp_path, step, loss)
        assert (tmp_path / "latest").read_text() == f"step-0000000{step}\n"
    assert [one.step for one in Survey().look(tmp_path)] == [7, 6, 4]
    assert (tmp_path / "best").read_text() == "step-00000006\n"


def test_a_loss_of_another_step_or_none_or_nonsense_makes_no_best(tmp_path):
    save(tmp_path, 1, 9.0)
    save(tmp_path, 2, 1.0, at=1)
    save(tmp_path, 3, None)
    manager = CheckpointManager(tmp_path, 1, SingleProcess())
    manager.save(5, 0, [Piece.whole("t", torch.ones(1))], {}, {}, {"evaluation": {"iteration": 5, "loss": "low"}})
    assert (tmp_path / "best").read_text() == "step-00000001\n"
    assert [one.step for one in Survey().look(tmp_path)] == [5, 1]


def test_a_damaged_best_is_not_counted_and_not_deleted(tmp_path):
    save(tmp_path, 1, 1.0)
    save(tmp_path, 2, 2.0)
    (tmp_path / "step-00000001" / "shard-00000.safetensors").write_bytes(b"")
    save(tmp_path, 3, 3.0)
    assert (tmp_path / "best").read_text() == "step-00000002\n"
    assert (tmp_path / "step-00000001").is_dir()


def test_a_survey_reads_a_manifest_once_and_still_notices_what_changes(tmp_path, monkeypatch):
    for step in (4, 8):
        save(tmp_path, step, float(step))
    survey, reads = Survey(), []
    read = CheckpointReader.__init__
    monkeypatch.setattr(CheckpointReader, "__init__", lambda self, *a, **k: reads.append(a) or read(self, *a, **k))
    for _ in range(3):
        assert [one.step for one in survey.look(tmp_path)] == [8, 4]
    assert len(reads) == 2
    (tmp_path / "step-00000008" / "shard-00000.safetensors").write_bytes(b"short")
    assert [one.step for one in survey.look(tmp_path)] == [4]
    (tmp_path / "step-00000004" / "manifest.json").write_text("{}")
    assert survey.look(tmp_path) == []
    assert len(reads) == 3
