"""`moetrain report` over a run that the commands themselves made."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from moetrain.testing import CliResult, run_cli

DA_MOE = "model.moe.router={type: da_moe, importance: row_entropy, mean_k: 2.0}"
REPORT = ("report", "run")


def page(path: Path) -> tuple[str, dict[str, Any]]:
    """The HTML, and the data inside it."""
    html = path.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found is not None
    return html, json.loads(found[1])


def written(folder: Path, *words: str, out: str = "run/report.html") -> tuple[str, dict[str, Any], CliResult]:
    result = run_cli(words, folder)
    assert result.code == 0, result
    assert f"wrote {out} (" in result.stdout
    return *page(folder / out), result


def refused(folder: Path, *words: str) -> str:
    before = sorted(folder.rglob("*"))
    result = run_cli(words, folder)
    assert result.code == 2, result
    assert result.stderr.count("error: ") == 1 and "Traceback" not in result.stderr
    assert sorted(folder.rglob("*")) == before
    return result.stderr.partition("error: ")[2]


def test_a_finished_run_becomes_a_page(folder: Path) -> None:
    result = run_cli(["train", "run.yaml", "run.dir=held", "data.split=50,50,0"], folder)
    assert result.code == 0, result
    html, data, result = written(folder, "report", "held", out="held/report.html")
    assert "with the checkpoint of step 2" in result.stderr
    assert "finished at step 2 of 2" in html
    assert "moetrain report held</code>" in html
    assert [line["label"] for line in data["lines"][0]["lines"]] == ["training"]
    assert data["lines"][0]["lines"][0]["steps"] == [1, 2]
    assert len(data["heats"]) == 2 and "chart-hyper-norm-ratio" in html
    assert data["text"]["layers"][0]["importance"] is None and not data["text"]["variableK"]
    assert "held-out documents (small)" in html
    assert sum(value is None for value in data["text"]["nll"]) == len(data["text"]["passages"])


def test_a_run_whose_text_cannot_be_read_still_has_its_curves(folder: Path) -> None:
    (folder / "small.model").rename(folder / "elsewhere.model")
    html, data, result = written(folder, *REPORT)
    assert "metrics alone: No text was read: tokenizer small.model: no such file" in result.stderr
    assert "No text was read: tokenizer small.model: no such file" in html
    assert data["text"] is None and data["lines"]
    assert "tokenizer small.model: no such file" in refused(folder, "report", "run", "--checkpoint", "2", "--out", "x")


def test_a_page_that_is_there_is_replaced_only_when_asked(folder: Path) -> None:
    (folder / "page.html").write_text("mine")
    text = refused(folder, *REPORT, "--out", "page.html")
    assert text.startswith("--out page.html is there already; --overwrite replaces it")
    assert (folder / "page.html").read_text() == "mine"
    html, data, _ = written(folder, *REPORT, "--out", "page.html", "--overwrite", "--metrics-only", out="page.html")
    assert data["text"] is None and "Not asked for (--metrics-only)." in html


def test_a_prompt_is_read_with_the_checkpoint_that_is_named(folder: Path) -> None:
    prompt = "import <b>os</b>\n\n</script>"
    html, data, _ = written(folder, *REPORT, "--prompt", prompt, "--checkpoint", "1")
    assert "The checkpoint of step 1 reads" in html
    assert [p["title"] for p in data["text"]["passages"]] == ["paragraph 1", "paragraph 2"]
    assert "".join(data["text"]["texts"]) == "import <b>os</b></script>"
    assert "--checkpoint 1</code>" in html


def test_a_run_on_importance_shows_it_from_a_text_file(folder: Path) -> None:
    result = run_cli(["train", "run.yaml", "run.dir=da", DA_MOE], folder)
    assert result.code == 0, result
    (folder / "a.txt").write_text("def f(x):\n    return x\n\nclass A: pass\n")
    _, data, _ = written(folder, "report", "da", "--text", "a.txt", out="da/report.html")
    text = data["text"]
    assert text["variableK"] and all(layer["importance"] for layer in text["layers"])
    assert set(text["summaries"]) == {"0", "1", "all"}
    assert "mean-k" in [chart["key"] for chart in data["lines"]]


def test_a_dense_run_has_a_page_without_experts(folder: Path) -> None:
    result = run_cli(["train", "run.yaml", "run.dir=dense", "model.moe=null", "data.split=50,50,0"], folder)
    assert result.code == 0, result
    html, data, _ = written(folder, "report", "dense", out="dense/report.html")
    assert data["heats"] == [] and data["text"]["layers"] == [] and data["text"]["nll"]
    assert "dense decoder: 2 layers" in html


def test_a_run_that_was_killed_before_its_first_checkpoint_shows_its_metrics(folder: Path) -> None:
    shutil.rmtree(folder / "run" / "checkpoints")
    (folder / "run" / "summary.json").unlink()
    with (folder / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "iterat')
    html, data, result = written(folder, *REPORT)
    assert "metrics alone: This run has no checkpoint yet" in result.stderr
    assert data["text"] is None and "This run has no checkpoint yet" in html
    assert "running, or killed: step 2 of 2" in html and "damaged" not in html


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("report", "nowhere"), "nowhere: no such folder; give a run's folder"),
        (("report", "run.yaml"), "run.yaml: not a folder"),
        (("report", "run/checkpoints"), "run/checkpoints is no run folder: it has no config.yaml"),
        ((*REPORT, "--checkpoint", "9"), "there is no checkpoint of step 9; there: 1, 2"),
        ((*REPORT, "--out", "run"), "--out run is a folder; name a file"),
        ((*REPORT, "--text", "gone.txt"), "--text gone.txt: cannot be read (No such file or directory)"),
        ((*REPORT, "--text", "small.bin"), "--text small.bin: cannot be read (not UTF-8)"),
        ((*REPORT, "--prompt", " "), "--prompt: holds no text"),
        ((*REPORT, "--prompt", "x", "--text", "run.yaml"), "--text and --prompt both say what to read"),
        ((*REPORT, "--prompt", "x", "--metrics-only"), "--metrics-only runs no model, so --prompt would mean nothing"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_shown_is_one_clear_error(folder: Path, words: tuple[str, ...], told: str) -> None:
    assert told in refused(folder, *words)


def test_a_folder_without_metrics_is_refused(folder: Path) -> None:
    (folder / "run" / "metrics.jsonl").unlink()
    assert "metrics.jsonl: not there" in refused(folder, *REPORT)


def test_text_for_a_run_without_a_checkpoint_is_refused(folder: Path) -> None:
    shutil.rmtree(folder / "run" / "checkpoints")
    assert "has no checkpoint to read text with" in refused(folder, *REPORT, "--prompt", "x")


def test_another_tokenizer_than_the_checkpoints_is_refused(folder: Path) -> None:
    shutil.copy(folder / "other.model", folder / "small.model")
    assert "is not the one that the checkpoint was trained with" in refused(folder, *REPORT, "--prompt", "x")


def test_a_damaged_checkpoint_is_refused(folder: Path) -> None:
    shard = next((folder / "run" / "checkpoints" / "step-00000002").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-8] + b"damaged!")
    assert "damaged" in refused(folder, *REPORT)
