"""`moetrain ckpt` on a run's own checkpoints, and what the run tells of its saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from moetrain.testing import CliResult, run_cli


def ckpt(folder: Path, *words: str, code: int = 0) -> CliResult:
    result = run_cli(["ckpt", *words], folder)
    assert result.code == code, result
    return result


def facts(folder: Path, *words: str, code: int = 0) -> Any:
    return json.loads(ckpt(folder, *words, "--json", code=code).stdout)


def damage(folder: Path, step: int) -> str:
    path = folder / "run" / "checkpoints" / f"step-{step:08d}" / "shard-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return path.name


def test_ls_and_inspect_tell_what_a_run_has_saved(folder: Path) -> None:
    rows = facts(folder, "ls", "run")
    assert [(row["step"], row["named"], row["error"]) for row in rows] == [(2, True, None), (1, False, None)]
    assert "step" in ckpt(folder, "ls", "run/checkpoints").stdout
    told = facts(folder, "inspect", "run", "--tensors")
    assert (told["step"], told["consumed_samples"]) == (2, 8)
    assert set(told["parts"]) == {"weights", "optimizer", "random states"}
    weights, optimizer = told["parts"]["weights"], told["parts"]["optimizer"]
    assert optimizer["elements"] == 2 * weights["elements"] == 2 * (weights["nbytes"] // 4)
    assert sum(file["bytes"] for file in told["files"].values()) == rows[0]["bytes"]
    assert told["tensors"]["weight.embedding.word_embeddings.weight"]["shape"] == [384, 32]
    page = ckpt(folder, "inspect", "run/checkpoints/step-00000001").stdout
    assert "optimizer" in page and "made on" in page


def test_verify_finds_the_damage_and_says_no(folder: Path) -> None:
    assert "step-00000002: sound" in ckpt(folder, "verify", "run", "--all").stdout
    name = damage(folder, 1)
    assert ckpt(folder, "verify", "run").stdout.endswith("step-00000002: sound\n")
    results = facts(folder, "verify", "run", "--all", code=1)
    assert [result["sound"] for result in results] == [True, False]
    assert name in results[1]["problems"][0]


def test_diff_tells_how_far_each_tensor_has_moved(folder: Path) -> None:
    same = ckpt(folder, "diff", "run", "run/checkpoints/step-00000002")
    assert "tensors are equal to the bit" in same.stdout
    rows = facts(folder, "diff", "run/checkpoints/step-00000001", "run/checkpoints/step-00000002", code=1)
    moved = {row["name"]: row["max_abs"] for row in rows}
    assert 0 < moved["weight.decoder.layers.0.mlp.experts.fc1"] < 0.01
    assert not any(row["equal"] for row in rows)


def test_prune_removes_what_no_rule_keeps_and_first_says_so(folder: Path) -> None:
    told = facts(folder, "prune", "run", "--keep-last", "1", "--dry-run")
    assert [one["step"] for one in told["removed"]] == [1] and told["kept"] == [2]
    assert [row["step"] for row in facts(folder, "ls", "run")] == [2, 1]
    assert "removed step 1" in ckpt(folder, "prune", "run", "--keep-last", "1").stdout
    assert [row["step"] for row in facts(folder, "ls", "run")] == [2]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("ls", "nothing"), "nothing: no checkpoints here"),
        (("inspect", "text.jsonl"), "text.jsonl is no checkpoint"),
        (("prune", "small.model", "--keep-last", "1"), "no checkpoints here"),
    ],
)
def test_what_is_no_checkpoint_is_a_clear_error(folder: Path, words: tuple[str, ...], error: str) -> None:
    result = ckpt(folder, *words, code=2)
    assert error in result.stderr and "Traceback" not in result.stderr


def test_saves_are_told_in_metrics_summary_and_console(folder: Path) -> None:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "checkpoint"]
    assert [row["iteration"] for row in rows] == [1, 2]
    for row in rows:
        assert row["checkpoint/stall_seconds"] > 0 and row["checkpoint/write_seconds"] > 0
        assert row["checkpoint/bytes"] > 0 and row["checkpoint/failed_in_a_row"] == 0
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert (summary["saves"], summary["failed_saves"], summary["checkpoint"]) == (2, 0, "step-00000002")


def test_a_run_goes_on_with_another_batch_size_where_the_stream_was_and_keeps_the_best(folder: Path) -> None:
    """Eight samples are consumed; six steps of two more are beyond what six steps of two from the start would need."""
    tree = yaml.safe_load((folder / "run.yaml").read_text())
    tree["training"] |= {"train_iters": 8, "global_batch_size": 2, "eval_iters": 1, "eval_interval": 2}
    tree["data"]["split"] = "90,10,0"
    tree["checkpoint"] = {"save_interval": 2, "keep_last": 1, "keep_best": 1, "verify_after_write": "checksum"}
    (folder / "longer.yaml").write_text(yaml.safe_dump(tree))
    result = run_cli(["train", "longer.yaml"], folder)
    assert result.code == 0, result
    rows = facts(folder, "ls", "run")
    assert rows[0]["step"] == 8 and facts(folder, "inspect", "run")["consumed_samples"] == 8 + 6 * 2
    losses = {row["step"]: row["loss"] for row in rows}
    best = (folder / "run" / "checkpoints" / "best").read_text().strip()
    assert losses[int(best.removeprefix("step-"))] == min(losses.values())


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ("checkpoint.keep_every=3", "checkpoint.save_interval=2"),
            "must be a multiple of checkpoint.save_interval (2)",
        ),
        (("checkpoint.keep_every=3", "checkpoint.save_interval=0"), "which must be at least 1"),
        (("checkpoint.keep_best=1",), "checkpoint.keep_best (1) needs validation"),
        (("checkpoint.keep_best=1", "training.eval_iters=1"), "must be a multiple of training.eval_interval (0)"),
        (("checkpoint.verify_after_write=full",), "checkpoint.verify_after_write"),
        (("checkpoint.max_failed_saves=0",), "checkpoint.max_failed_saves"),
    ],
)
def test_rules_that_cannot_be_kept_are_refused_before_anything_starts(
    finished_run: Path, words: tuple[str, ...], error: str
) -> None:
    result = run_cli(["config", "check", "run.yaml", *words], finished_run)
    assert result.code == 2 and error in result.stderr, result
