"""A small run on the disk, made once by the commands themselves, and a copy of it for each test."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from moetrain.testing import run_cli

RUN = {
    "run": {"dir": "run", "name": "small"},
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "ffn_hidden_size": 64,
        "vocab_size": 384,
        "seq_length": 32,
        "moe": {
            "num_experts": 4,
            "ffn_hidden_size": 16,
            "router": {"type": "top_k", "top_k": 1},
            "hyper": {
                "bottleneck": 4,
                "hidden": 8,
                "expert_embedding": 8,
                "process": 8,
                "condition": 8,
            },
        },
    },
    "data": {"tokenizer": {"path": "small.model"}, "train": [{"path": "small"}]},
    "training": {
        "train_iters": 2,
        "global_batch_size": 4,
        "precision": "fp32",
        "eval_iters": 0,
        "log_interval": 1,
    },
    "checkpoint": {"save_interval": 1},
    "runtime": {"device": "cpu", "cpu_threads": 1},
}


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `text.jsonl`, two tokenizers, the corpus of each, `run.yaml`, and in `run` two checkpoints."""
    folder = tmp_path_factory.mktemp("finished-run")
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    commands = [["data", "corpus", "text.jsonl", "--max-bytes", "100000", "--quiet"]]
    for name, vocabulary in (("small", "360"), ("other", "370")):
        commands.append(["data", "tokenizer", "text.jsonl", "--output", name, "--vocab-size", vocabulary])
        commands.append(
            ["data", "prepare", "text.jsonl", "--output", name, "--tokenizer", f"{name}.model", "--quiet"],
        )
    commands.append(["train", "run.yaml"])
    for command in commands:
        result = run_cli(command, folder)
        assert result.code == 0, f"{command}: {result}"
    return folder


@pytest.fixture
def folder(finished_run: Path, tmp_path: Path) -> Path:
    """The test's own copy of the finished run."""
    return shutil.copytree(finished_run, tmp_path / "copy")
