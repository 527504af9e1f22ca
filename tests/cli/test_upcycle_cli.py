"""From a dense run through `moetrain upcycle` to a HyperMoE run that goes on where it stood, by the commands alone."""

from __future__ import annotations

import json
from pathlib import Path

from moetrain.testing import run_cli

HYPERMOE = ["model.moe.ffn_hidden_size=64", "model.moe.router={type: top_k, top_k: 2, gates: renormalized}"]
TRAIN = ["train", "run.yaml", "training.train_iters=1"]


def first_loss(folder: Path, run: str) -> float:
    rows = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    return next(row["train/loss"] for row in rows if row["kind"] == "train")


def test_a_dense_run_goes_on_as_a_hypermoe_and_cannot_be_mistaken_for_one(folder: Path) -> None:
    def command(*words: str) -> str:
        result = run_cli(words, folder)
        assert result.code == 0, result
        return result.stdout

    command("train", "run.yaml", "model.moe=null", "run.dir=dense", "optimizer.lr=1e-2")
    said = command("upcycle", "dense", "run.yaml", *HYPERMOE, "--out", "start")
    assert "largest difference of a logit" in said

    anew = "checkpoint.load_weights_only=true"
    command(*TRAIN, "model.moe=null", "run.dir=dense-again", "checkpoint.load=dense", anew)
    command(*TRAIN, *HYPERMOE, "run.dir=hypermoe", "checkpoint.load=start", anew)
    command(*TRAIN, "model.moe=null", "run.dir=untrained")
    dense, hypermoe, untrained = (first_loss(folder, run) for run in ("dense-again", "hypermoe", "untrained"))
    assert abs(hypermoe - dense) < 1e-5 < abs(untrained - dense)

    resumed = run_cli([*TRAIN, *HYPERMOE, "run.dir=resumed", "checkpoint.load=start"], folder)
    assert resumed.code == 2
    assert "holds weights and no optimizer state" in resumed.stderr
    assert not list((folder / "resumed").glob("checkpoints/step-*"))

    other = run_cli([*TRAIN, "run.dir=other", "checkpoint.load=start", anew], folder)
    assert other.code == 2
    assert "model.moe.ffn_hidden_size: 64 in the checkpoint, 16 in this run" in other.stderr
    refused = run_cli(["upcycle", "dense", "run.yaml", "--out", "more"], folder)
    assert refused.code == 2
    assert "model.moe.ffn_hidden_size (16) must be the source's model.ffn_hidden_size (64)" in refused.stderr
    assert not (folder / "more").exists()
