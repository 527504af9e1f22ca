"""From a Hugging Face folder of a Switch Transformer to GLUE's measures of the paper's arms, by the command."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import typer
from transformers import SwitchTransformersConfig, SwitchTransformersEncoderModel
from typer.testing import CliRunner

from moetrain.cli import claims_glue
from moetrain.cli.claims_glue import Recipe, Score, write_report

WORDS = ("fine", "dull")


def text(i: int) -> str:
    return f"a {WORDS[i % 2]} film number {i} with {('music', 'plot', 'cast')[i % 3]} "


def write_glue(folder: Path) -> None:
    """SST-2 as the download has it, and STS-B as JSON lines."""
    for task in ("SST-2", "STS-B"):
        (folder / task).mkdir(parents=True)
    for part, numbers in (("train", range(64)), ("dev", range(100, 121))):
        lines = [f"{text(i)}\t{int(i % 2 == 0)}" for i in numbers]
        (folder / "SST-2" / f"{part}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
        pairs = [
            {"sentence1": text(i), "sentence2": text(i // 2), "label": float(i % 2 == i // 2 % 2)} for i in numbers
        ]
        (folder / "STS-B" / f"{part}.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("switch")
    write_glue(folder / "glue")
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=200,
        d_model=32,
        d_kv=16,
        d_ff=32,
        num_heads=2,
        num_layers=2,
        num_sparse_encoder_layers=1,
        num_experts=4,
        expert_capacity=6,
    )
    SwitchTransformersEncoderModel(config).save_pretrained(folder / "tiny")
    (folder / "text.txt").write_text("\n".join(map(text, range(300))))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tiny" / "spiece"),
        vocab_size=60,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return folder


def glue(words: list[str], folder: Path) -> Any:
    """`claims glue` in this process; the trainings are processes of their own."""
    app = typer.Typer()
    app.command()(claims_glue.glue)
    always = ["--model", "tiny", "--data", "glue", "--out", "judged", "--lr", "2e-3", "--batch-size", "8"]
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(claims_glue.__file__).parents[2]))
        return CliRunner().invoke(app, [*always, "--seq-length", "24", *words])


def test_the_papers_arms_start_from_imported_weights_and_are_judged(place: Path) -> None:
    arms = ["plain", "hypermoe"]
    result = glue(["--task", "SST-2", "--epochs", "4", "--arm", "plain", "--arm", "hypermoe"], place)
    assert result.exit_code == 0, result
    out = place / "judged"
    record = json.loads((out / "glue.json").read_text())
    assert [score["arm"] for score in record["scores"]] == arms
    assert all(score["scores"]["accuracy"] > 0.8 for score in record["scores"]), record
    assert record["averages"].keys() == set(arms)
    first = {}
    for arm in arms:
        run = out / "SST-2" / arm / "seed-1234" / "run"
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        first[arm] = next(row["train/loss"] for row in rows if row["kind"] == "train")
    assert first["hypermoe"] == first["plain"]  # a hyper-expert starts at zero
    other = glue(["--task", "SST-2", "--epochs", "4", "--dropped", "input"], place)
    assert "was imported from tiny with --dropped zero; choose another --out" in str(other.exception)
    other = glue(["--task", "SST-2", "--model", "judged/imported", "--dropped", "input"], place)
    assert "--dropped (input) is of an import; judged/imported is no Hugging Face folder" in str(other.exception)
    other = glue(["--task", "SST-2", "--epochs", "4", "--arm", "hypermoe", "--seed", "5"], place)
    assert "was made of another model or seed" in str(other.exception)


def test_a_score_of_pairs_is_learned_by_da_moe(place: Path) -> None:
    result = glue(["--task", "STS-B", "--epochs", "3", "--arm", "damoe-mean-k"], place)
    assert result.exit_code == 0, result
    (score,) = json.loads((place / "judged" / "glue.json").read_text())["scores"]
    assert score["scores"].keys() == {"pearson", "spearman"}
    assert (score["arm"], score["examples"], score["train_examples"]) == ("damoe-mean-k", 21, 64)
    assert 1.5 < score["mean_k"] < 2.5


def test_a_report_of_several_seeds_has_spreads_and_paired_differences(tmp_path: Path) -> None:
    scores = [
        Score(task, "dev", arm, seed, {name: base + gain + 0.01 * seed}, 9, 99, 0, 7, 1.0)
        for task, name, base in (("CoLA", "matthews_correlation", 0.4), ("RTE", "accuracy", 0.6))
        for arm, gain in (("plain", 0.0), ("hypermoe", 0.1))
        for seed in (1, 2, 3)
    ]
    recipe = Recipe(3.0, 32, 3e-5, 0.1, None, (1, 2, 3), 1)
    write_report(tmp_path, Path("tiny"), recipe, scores)
    page = (tmp_path / "glue.md").read_text()
    assert "| CoLA | plain | matthews_correlation 0.4200 ± 0.0100 | 1.00 | 9 | 99 | 0 | 7 |" in page
    assert "- hypermoe: 0.6200" in page
    assert "- hypermoe: +0.1000 (+0.1000 to +0.1000, 3 pairs)" in page
