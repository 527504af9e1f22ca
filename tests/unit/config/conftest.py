from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

TREE: dict[str, Any] = {
    "run": {"dir": "runs/test"},
    "model": {
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 96,
        "vocab_size": 512,
        "seq_length": 32,
        "moe": {"num_experts": 8, "ffn_hidden_size": 48, "layer_freq": 2, "router": {"type": "top_k", "top_k": 2}},
    },
    "data": {"tokenizer": {"path": "tok.model"}, "train": [{"path": "a"}, {"path": "b"}]},
    "training": {"train_iters": 10, "global_batch_size": 16},
}


@pytest.fixture
def tree() -> dict[str, Any]:
    """A complete config as plain types, the test's own to change."""
    return copy.deepcopy(TREE)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes text (or a tree) to a file under tmp_path and gives its path."""

    def _write(name: str, content: str | dict[str, Any]) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        return path

    return _write
