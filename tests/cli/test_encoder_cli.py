"""A masked language model and what is made of it, by the commands that a user types."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from moetrain.cli import claims_glue
from moetrain.testing import CliResult, run_cli

MODEL: dict[str, Any] = {
    "type": "encoder",
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "ffn_hidden_size": 64,
    "vocab_size": 384,
    "seq_length": 32,
    "share_embeddings_and_output_weights": True,
    "moe": {
        "num_experts": 4,
        "ffn_hidden_size": 16,
        "router": {"type": "da_moe", "importance": "col_max"},
        "hyper": {"bottleneck": 4, "hidden": 8, "expert_embedding": 8, "process": 8, "condition": 8},
    },
}
RUN: dict[str, Any] = {
    "run": {"dir": "pretrained"},
    "model": MODEL,
    "data": {"tokenizer": {"path": "small.model"}, "train": [{"path": "small"}], "split": "90,10,0"},
    "training": {
        "train_iters": 12,
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "precision": "fp32",
        "eval_iters": 2,
        "eval_interval": 6,
        "log_interval": 1,
        "objective": {"type": "masked_lm"},
    },
    "optimizer": {"lr": 3e-3},
    "checkpoint": {"save_interval": 6},
    "runtime": {"device": "cpu", "cpu_threads": 1},
}


def write_examples(path: Path, count: int, offset: int) -> None:
    """Texts with one of two words in them, and which."""
    lines = []
    for i in range(offset, offset + count):
        word = ("import", "return")[i % 2]
        text = f"{word} value_{i} " * (1 + i % 3)
        lines.append(json.dumps({"sentence": text, "kind": ("first", "second")[i % 2], "score": i % 2 + 0.5}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def finetuning(objective: dict[str, Any], outputs: int, **checkpoint: Any) -> dict[str, Any]:
    model = MODEL | {"head": {"outputs": outputs}, "seq_length": 24}
    data = {"tokenizer": {"path": "small.model"}, "train": [{"path": "train.jsonl"}], "valid": [{"path": "dev.jsonl"}]}
    training = RUN["training"] | {"objective": objective, "train_iters": 30, "eval_interval": 10}
    return RUN | {
        "run": {"dir": "tuned"},
        "model": model,
        "data": data,
        "training": training,
        "checkpoint": {"load": "pretrained", "load_weights_only": True} | checkpoint,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with a mask token, a corpus, a pretrained encoder, and examples."""
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    write_examples(folder / "train.jsonl", 64, 0)
    write_examples(folder / "dev.jsonl", 21, 1000)  # no multiple of the global batch
    for command in (
        ["data", "corpus", "text.jsonl", "--max-bytes", "60000", "--quiet"],
        ["data", "tokenizer", "text.jsonl", "--output", "small", "--vocab-size", "360", "--mask-token"],
        ["data", "prepare", "text.jsonl", "--output", "small", "--tokenizer", "small.model", "--quiet"],
        ["train", "run.yaml"],
    ):
        result = run_cli(command, folder)
        assert result.code == 0, f"{command}: {result}"
    return folder


def tune(folder: Path, name: str, tree: dict[str, Any], *overrides: str) -> CliResult:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return run_cli(["train", f"{name}.yaml", f"run.dir={name}", *overrides], folder)


def metrics(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def test_a_masked_language_model_learns_and_tells_its_accuracy(folder: Path) -> None:
    steps, evaluations = metrics(folder / "pretrained", "train"), metrics(folder / "pretrained", "eval")
    assert steps[-1]["train/loss"] < steps[0]["train/loss"]
    assert [row["iteration"] for row in evaluations] == [6, 12]
    assert all(0 <= row["eval/accuracy"] < 1 for row in evaluations)
    assert evaluations[-1]["eval/accuracy"] > 0
    assert evaluations[-1]["eval/unigram_entropy"] > 0


def test_a_classifier_starts_from_the_encoder_says_what_is_new_and_resumes(folder: Path) -> None:
    tree = finetuning({"type": "classify", "classes": ["first", "second"], "text": "sentence", "label": "kind"}, 2)
    first = tune(folder, "tuned", tree, "training.stop_after=10")
    assert first.code == 0, first
    log = first.stdout + first.stderr
    assert "not in the checkpoint, so at their initial values: weight.head.bias, weight.head.weight" in log
    assert "all else starts anew" in log
    summary = json.loads((folder / "tuned" / "summary.json").read_text())
    assert (summary["start_iteration"], summary["iteration"]) == (0, 10)
    second = tune(folder, "tuned", tree)
    assert second.code == 0, second
    assert "initial values" not in second.stdout + second.stderr
    summary = json.loads((folder / "tuned" / "summary.json").read_text())
    assert (summary["start_iteration"], summary["iteration"]) == (10, 30)
    assert set(summary["eval_scores"]) == {"accuracy", "f1", "matthews_correlation"}
    assert summary["eval_scores"]["accuracy"] > 0.9


def test_a_score_is_learned_and_told_by_correlations(folder: Path) -> None:
    tree = finetuning({"type": "regress", "text": "sentence", "label": "score"}, 1)
    assert tune(folder, "scored", tree).code == 0
    scores = json.loads((folder / "scored" / "summary.json").read_text())["eval_scores"]
    assert set(scores) == {"pearson", "spearman"}
    assert scores["pearson"] > 0.8


def test_what_cannot_be_is_refused_with_one_error(folder: Path) -> None:
    classify = {"type": "classify", "classes": ["first", "other"], "text": "sentence", "label": "kind"}
    cases = [
        (finetuning(classify, 2), "label 'second' is none of training.objective.classes: first, other"),
        (finetuning(classify, 3), "needs model.head.outputs: 2; there is 3"),
        (finetuning(classify | {"label": "sort"}, 2), "train.jsonl:1: has no 'sort'"),
        (finetuning(classify, 2, load_weights_only=False, load="pretrained"), "'second' is none"),
        (RUN | {"model": MODEL | {"type": "decoder"}}, "looks at later tokens"),
        (RUN | {"training": RUN["training"] | {"objective": {"type": "causal_lm"}}}, "must predict; legal with it"),
        (RUN | {"model": MODEL | {"head": {"outputs": 2}}}, "needs the output layer"),
        (RUN | {"checkpoint": {"load_weights_only": True}}, "load_weights_only: true needs checkpoint.load"),
    ]
    for tree, words in cases:
        result = tune(folder, "refused", tree)
        assert result.code == 2, words
        assert words in result.stderr, result.stderr
        assert result.stderr.count("error: ") == 1
    good = finetuning({"type": "regress", "text": "sentence", "label": "score"}, 1, load_weights_only=False)
    whole = tune(folder, "refused", good)
    assert whole.code == 2
    assert "model.head: null in the checkpoint" in whole.stderr


def glue(words: list[str], folder: Path) -> CliResult:
    """`claims glue` in this process; the trainings are processes of their own."""
    app = typer.Typer()
    app.command()(claims_glue.glue)
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(claims_glue.__file__).parents[2]))
        result = CliRunner().invoke(app, words)
    return CliResult(result.exit_code, result.output, str(result.exception))


def test_glue_tasks_are_trained_judged_and_reported(folder: Path) -> None:
    data = folder / "glue"
    (data / "SST-2").mkdir(parents=True)
    for part, offset, count in (("train", 0, 64), ("dev", 1000, 21)):
        write_examples(folder / "plain.jsonl", count, offset)
        rows = [json.loads(line) for line in (folder / "plain.jsonl").read_text().splitlines()]
        lines = [f"{row['sentence']}\t{int(row['kind'] == 'second')}" for row in rows]
        (data / "SST-2" / f"{part}.tsv").write_text("sentence\tlabel\n" + "\n".join(lines) + "\n")
    words = ["--model", "pretrained", "--data", "glue", "--out", "judged", "--lr", "3e-3", "--batch-size", "8"]
    result = glue([*words, "--epochs", "4"], folder)
    assert result.code == 0, result
    record = json.loads((folder / "judged" / "glue.json").read_text())
    (score,) = record["scores"]
    assert (score["task"], score["examples"], score["train_examples"], score["steps"]) == ("SST-2", 21, 64, 32)
    assert record["averages"]["plain"] == score["scores"]["accuracy"] > 0.9
    assert (
        f"| SST-2 | plain | accuracy {record['averages']['plain']:.4f} | {score['mean_k']:.2f} | 21 | 64 | 0 | 32 |"
        in (folder / "judged" / "glue.md").read_text()
    )
    again = glue([*words, "--epochs", "5"], folder)
    assert "choose another --out" in again.stderr
    assert "legal: CoLA" in glue([*words, "--task", "SQuAD"], folder).stderr
    assert "legal: plain, hypermoe" in glue([*words, "--arm", "other"], folder).stderr
    assert "has a hyper-expert already" in glue([*words, "--arm", "hypermoe"], folder).stderr


def test_an_encoder_is_not_exported_as_something_else(folder: Path) -> None:
    result = run_cli(["convert", "to-hf", "pretrained", "exported"], folder)
    assert result.code == 2
    assert "model.type is encoder; only decoders can be exported" in result.stderr
    assert not (folder / "exported").exists()


def test_a_report_shows_the_curves_of_an_encoder_and_says_why_no_text(folder: Path) -> None:
    result = run_cli(["report", "pretrained", "--out", "report.html"], folder)
    assert result.code == 0, result
    assert "metrics alone: No text was read: a model of training.objective.type masked_lm" in result.stderr
    asked = run_cli(["report", "pretrained", "--prompt", "some text", "--out", "other.html"], folder)
    assert asked.code == 2
    assert not (folder / "other.html").exists()


def test_a_tokenizer_without_a_mask_token_is_refused_before_any_work(folder: Path) -> None:
    plain = ["data", "tokenizer", "text.jsonl", "--output", "plain", "--vocab-size", "350"]
    assert run_cli(plain, folder).code == 0
    result = run_cli(["train", "run.yaml", "run.dir=unmasked", "data.tokenizer.path=plain.model"], folder)
    assert result.code == 2
    assert "--mask-token" in result.stderr
    assert not (folder / "unmasked").exists()
