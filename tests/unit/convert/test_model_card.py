"""The model card and the record beside it: valid, complete, silent about the machine, deaf to markup."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from moetrain.checkpoint import CheckpointReader
from moetrain.config.model import ModelConfig
from moetrain.convert.from_hf import import_hf
from moetrain.convert.hf import export_hf
from moetrain.convert.model_card import model_card
from moetrain.convert.training_record import FILE, TrainingRecord

from .conftest import KINDS, make_model

QUIET: Callable[[str], None] = lambda _: None  # noqa: E731


@pytest.fixture(scope="module")
def exported(write_run: Callable[[ModelConfig, str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(make_model("da_moe-hyper"), "tiny da_moe-hyper")
    out = tmp_path_factory.mktemp("card") / "hf"
    with CheckpointReader(run / "checkpoints" / "step-00000020") as reader:
        export_hf(reader, out, announce=QUIET)
    return out


def record_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / FILE).read_text())


def test_the_card_tells_what_was_trained_and_hides_where(exported: Path, sentencepiece_model: Path) -> None:
    card = (exported / "README.md").read_text()
    for fact in (
        *("# tiny da_moe-hyper\n", "DA-MoE", "HyperMoE", "2 on average"),
        *("20 of 20 steps of 4 sequences of 64 tokens", "5,120 tokens", "`corpus_text` (weight 2)"),
        *("peak learning rate 0.0003 (wsd)", "bf16", "seed 1234", "tensor 2 x data 2 x pipeline 1; ZeRO-1"),
        *("3.2500 nats per token", "3.5000 on validation data after step 10", "3, whose gradients were not finite"),
        *("moetrain 0.1.0, torch 2.13.0", "trust_remote_code=True", "moetrain convert from-hf", "## Limits"),
        *("context in training | 64 tokens", "dtype of this export | float32", "`license:`"),
    ):
        assert fact in card, fact
    everything = "".join(p.read_text() for p in exported.iterdir() if p.suffix in (".md", ".json"))
    assert "/secret" not in everything and str(sentencepiece_model.parent) not in everything


def test_the_settings_are_those_that_are_no_defaults(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    settings = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert settings == record_in(exported)["settings"]
    assert settings["model.moe.router.type"] == "da_moe" and settings["training.train_iters"] == 20
    assert settings["model.moe.hyper.bottleneck"] == 3 and "optimizer.lr" not in settings


@pytest.mark.parametrize("kind", KINDS)
def test_the_header_is_what_the_hub_reads(kind: str, exported: Path) -> None:
    """Parsed by the Hub's own library, and again from what that library writes."""
    model, own_code = make_model(kind), kind != "dense"
    record = TrainingRecord.model_validate(record_in(exported))
    card = ModelCard(model_card("a: b", model, record, "bfloat16", own_code))
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert ("custom_code" in data["tags"]) == own_code and len(set(data["tags"])) == len(data["tags"])
    assert ("mixture-of-experts" in data["tags"]) == (model.moe is not None)
    assert "license" not in data  # the user's to choose
    assert ModelCardData(**yaml.safe_load(card.data.to_yaml())).to_dict() == data
    assert card.text.lstrip().startswith("# a: b\n")


def test_the_card_counts_what_works_on_a_token(exported: Path) -> None:
    """Of the top 2 of 5 experts of width 9, in layer 2 of 3, three rest: 3 matrices of 9 x 24 each."""
    card = model_card("x", make_model("top_k"), None, "float32")
    total, active = (
        int(card.split(f"| {what} | ")[1].split(" ")[0].replace(",", ""))
        for what in ("parameters", "of them at work on a token")
    )
    assert total - active == 3 * 3 * 9 * 24
    assert "no training step on them" in card and "## Limits" in card


def changed(exported: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """An export whose record somebody has changed; `change` returns the file's new text, or edits its content."""
    shutil.copytree(exported, folder)
    record = record_in(exported)
    text = change(record)
    (folder / FILE).write_text(text if isinstance(text, str) else json.dumps(record))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(step="20"),
        lambda r: r.update(step=0),
        lambda r: r.update(format=2),
        lambda r: r.update(surprise=1),
        lambda r: r.update(name="x" * 1001),
        lambda r: r["settings"].update(a={"b": 1}),
        lambda r: json.dumps(r).replace("3.25", "1e999"),
        lambda r: json.dumps(r).replace("3.25", "NaN"),
        lambda _: "[" * 10_000,
        lambda _: " " * (2**20 + 1),
    ],
)
def test_a_record_that_is_none_stays_behind_with_a_note(
    exported: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    folder = changed(exported, tmp_path / "hf", change)
    report = import_hf(folder, tmp_path / "imported", announce=QUIET)
    assert any(note.startswith(f"{FILE} stays behind") and len(note) <= 500 for note in report.notes)


def test_markup_in_a_record_stays_text(exported: Path, tmp_path: Path) -> None:
    evil = "`x`\n---\nlicense: mit\n# <script>alert(1)</script> [a](b) ```"

    def change(record: dict[str, Any]) -> None:
        record.update(name=evil, layout=evil, started_from=evil, versions={evil: evil}, schedule=evil, precision=evil)
        record["data"] = [{"name": evil, "weight": 1.0}]
        record["settings"] = {evil: evil, "a.b": [1, "\n```\n<b>"]}

    report = import_hf(changed(exported, tmp_path / "hf", change), tmp_path / "imported", announce=QUIET)
    assert not any(FILE in note for note in report.notes)
    with CheckpointReader(tmp_path / "imported") as reader:
        export_hf(reader, tmp_path / "again", announce=QUIET)
    before, after = ((place / "README.md").read_text() for place in (exported, tmp_path / "again"))
    assert ModelCard(after).data.to_dict() == ModelCard(before).data.to_dict()
    fences, headings = (
        [[line for line in text.splitlines() if line.startswith(start)] for text in (before, after)]
        for start in ("```", "## ")
    )
    assert fences[0] == fences[1] and headings[0] == headings[1]
    prose = after.split("```yaml")[0] + after.split("</details>")[1]
    tags = re.findall(r"(?<!\\)<[^>]*>", re.sub(r"`[^`\n]*`", "", prose))  # what neither code nor an escape covers
    assert set(tags) == {"<details>", "<summary>", "</summary>"}
