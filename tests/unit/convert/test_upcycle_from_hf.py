"""A Hugging Face folder as the source of an upcycling."""

from __future__ import annotations

from pathlib import Path

import yaml
from stock_models import save_stock
from typer.testing import CliRunner

from moetrain.checkpoint import CheckpointReader
from moetrain.cli.upcycle import app
from moetrain.convert.from_hf import import_hf


def test_a_dense_folder_becomes_experts_with_the_same_logits(tmp_path: Path) -> None:
    save_stock("qwen3", tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "imported", announce=lambda _: None)
    config = yaml.safe_load((tmp_path / "imported" / "config.yaml").read_text())
    router = {"type": "top_k", "top_k": 2, "gates": "renormalized"}
    config["model"]["moe"] = {"num_experts": 4, "ffn_hidden_size": 48, "router": router}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    words = [str(tmp_path / "hf"), str(tmp_path / "run.yaml"), "--out", str(tmp_path / "moe")]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0
    assert "compared: 128 positions, largest difference of a logit" in result.output
    with CheckpointReader(tmp_path / "moe") as reader:
        assert reader.shape("weight.decoder.layers.0.mlp.experts.fc1") == (4, 96, 32)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "imported", "moe", "run.yaml"]
