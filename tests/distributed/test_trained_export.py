"""Models of every kind, trained on tensor, pipeline, expert and data parallel ranks together, leave for Hugging Face:
the exporter's own proof, batches with left padding, and a stranger's tool on the folder (lm_eval)."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from parity import Layout, batch_of, layout_of, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from moetrain.checkpoint import CheckpointManager, CheckpointReader, SingleProcess, TorchDistributed
from moetrain.cli.convert import app
from moetrain.config.schema import RunConfig
from moetrain.data.train_tokenizer import train_sentencepiece
from moetrain.runtime.groups import create_groups
from moetrain.testing import run_distributed
from moetrain.train.data import RunData
from moetrain.train.metrics import Throughput
from moetrain.train.setup import build_step
from moetrain.train.trainer import Trainer

LAYOUT = Layout("tp2+sp x pp2 x ep2", 4, tensor=2, pipeline=2, expert=2, sequence=True)
VOCABULARY = 304
TOP_K = {"type": "top_k", "top_k": 2, "gates": "renormalized"}
# Name: what changes in the parity table's model, and the class that transformers makes of the export.
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({"router": TOP_K, "hyper": None, "layer_freq": 1}, "MixtralForCausalLM"),
    "HyperMoE": ({"router": TOP_K}, "MoetrainForCausalLM"),
    "DA-MoE": ({"hyper": None}, "MoetrainForCausalLM"),
    "both": ({}, "MoetrainForCausalLM"),
}
TEXT = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen jugs", "def f(x): return x + 1"]
PROMPTS = ["the quick", "pack my box with five", "d", "jugs over the lazy dog, and a box"]


class Progressions:
    """Samples of the parity table's data."""

    def __init__(self, config: RunConfig, length: int) -> None:
        self._length = length
        self._rows = [batch for step in range(8) for batch in batch_of(step, config, 0, 1)]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        batch = self._rows[index % len(self._rows)]
        return {"tokens": batch.tokens[0], "labels": batch.labels[0]}


def config_of(kind: str, folder: Path) -> RunConfig:
    moe, _ = KINDS[kind]
    changes = {f"model__moe__{key}": value for key, value in moe.items()}
    data = {"tokenizer": {"path": str(folder / "small.model")}, "train": [{"path": "progressions"}]}
    run = {"dir": str(folder / kind), "name": kind}
    changes |= {"model__vocab_size": VOCABULARY, "model__seq_length": 48, "optimizer__lr": 1e-2}
    return tiny_config(LAYOUT, data=data, run=run, **changes)


def train(folder: Path) -> None:
    """Every kind for a few steps, with its checkpoint."""
    groups = create_groups(layout_of(config_of("both", folder)), seed=1)
    for kind in KINDS:
        config = config_of(kind, folder)
        torch.manual_seed(1)
        step = build_step(config, groups, torch.device("cpu"))
        samples = Progressions(config, config.training.train_iters * config.training.global_batch_size)
        data = RunData(samples, lambda length, c=config: Progressions(c, length), None, 0, "none", None)
        manager = CheckpointManager(folder / kind / "checkpoints", 1, TorchDistributed())
        Trainer(config, step, data, manager, [], Throughput(), logging.getLogger("test")).fit()


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder that holds `<kind>-hf` of every kind, and what the exporter printed."""
    folder = tmp_path_factory.mktemp("trained")
    train_sentencepiece(TEXT * 4, folder / "small", 300, "bpe")
    run_distributed(train, LAYOUT.world, folder)
    printed = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        for kind in KINDS:
            words = ["to-hf", str(folder / kind), str(folder / f"{kind}-hf"), "--verify"]
            result = CliRunner().invoke(app, words)
            assert result.exit_code == 0, (kind, result.output, result.exception)
            printed[kind] = result.output
    return folder, printed


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_trained_on_all_parallelisms_proves_its_export_and_generates_in_batches(
    kind: str, exports: tuple[Path, dict[str, str]]
) -> None:
    folder, printed = exports
    newest = CheckpointManager(folder / kind / "checkpoints", 1, SingleProcess()).latest()
    assert newest is not None
    with CheckpointReader(newest) as reader:
        assert reader.layout["world_size"] == LAYOUT.world and reader.step == 5
    print(printed[kind])
    assert "largest difference of a logit" in printed[kind]
    stock = KINDS[kind][1] != "MoetrainForCausalLM"
    out = folder / f"{kind}-hf"
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=not stock)
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=not stock).eval()
    assert type(model).__name__ == KINDS[kind][1]
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    assert (batch["attention_mask"][:, 0] == 0).any(), "the prompts are of one length, so this proves nothing"
    new = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    together = model.generate(**batch, **new)[:, -4:]
    for prompt, tokens in zip(PROMPTS, together, strict=True):
        alone = model.generate(**tokenizer(prompt, return_tensors="pt", return_token_type_ids=False), **new)
        assert alone[0, -4:].tolist() == tokens.tolist(), prompt


def write_tasks(folder: Path) -> None:
    """Two local tasks: a choice of endings, and the bits per byte of a text."""
    choices = [
        {"question": "the quick brown", "choices": [" fox", " jugs", " f(x)"], "answer": n % 3} for n in range(6)
    ]
    for name, rows in (("choices", choices), ("text", [{"text": text} for text in TEXT])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def task(name: str, **settings: Any) -> None:
        files = {"data_files": {"test": str(folder / f"{name}.jsonl")}}
        tree = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", **settings}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")

    accuracy = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    task(
        "choices",
        output_type="multiple_choice",
        doc_to_text="question",
        doc_to_choice="choices",
        doc_to_target="answer",
        target_delimiter="",
        metric_list=accuracy,
    )
    bits = [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}]
    task("text", output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="text", metric_list=bits)


def bits_per_byte(folder: Path) -> float:
    """Of the texts, by the model's logits: every token of a text after the end of the document before it."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    nats = 0.0
    for text in TEXT:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens = torch.tensor([[tokenizer.bos_token_id or tokenizer.eos_token_id, *ids]])
        with torch.no_grad():
            logits = model(tokens[:, :-1]).logits
        nats += torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:], reduction="sum").item()
    return nats / math.log(2) / sum(len(text.encode()) for text in TEXT)


@pytest.mark.parametrize("kind", ["plain", "both"])
def test_lm_eval_runs_offline_on_an_export_and_agrees_with_its_logits(
    kind: str, exports: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    folder = exports[0] / f"{kind}-hf"
    write_tasks(tmp_path)
    words = ["--model", "hf", "--model_args", f"pretrained={folder},trust_remote_code=True,dtype=float32"]
    words += ["--tasks", "choices,text", "--include_path", str(tmp_path), "--device", "cpu", "--batch_size", "4"]
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *words, "--output_path", str(tmp_path / "out")],
        env=os.environ | home,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())["results"]
    print(json.dumps(results, indent=1))
    assert results["choices"]["acc,none"] in [n / 6 for n in range(7)]
    assert results["text"]["bits_per_byte,none"] == pytest.approx(bits_per_byte(folder), rel=1e-5)
