"""An imported model trains on a parallel layout, from the loss that transformers computes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from parity import LAYOUTS, batch_of, layout_of, run_steps
from stock_models import save_stock

from moetrain.checkpoint import CheckpointReader
from moetrain.config.loader import config_from_dict
from moetrain.config.schema import ParallelConfig, RunConfig
from moetrain.convert.from_hf import import_hf
from moetrain.runtime.groups import create_groups
from moetrain.testing import run_distributed
from moetrain.train.setup import build_step
from moetrain.train.state import restore_weights

KINDS = ("mixtral-wide-heads", "qwen3_moe-dense-layers", "olmoe", "dots1", "deepseek_v3", "deepseek_v2")
LAYOUT = next(layout for layout in LAYOUTS if layout.name == "tp2+sp x ep2")


def config_of(folder: Path) -> RunConfig:
    with CheckpointReader(folder) as reader:
        run = config_from_dict(reader.config, "manifest")
    parallel = ParallelConfig(tensor=LAYOUT.tensor, sequence=LAYOUT.sequence, expert=LAYOUT.expert)
    training = run.training.model_copy(update={"precision": "fp32"})
    return run.model_copy(update={"parallel": parallel, "training": training})


def train(folders: list[Path]) -> list[list[float]]:
    """Losses of two steps on the same batch from each folder."""
    configs = [config_of(folder) for folder in folders]
    groups = create_groups(layout_of(configs[0]), seed=1)
    losses = []
    for folder, config in zip(folders, configs, strict=True):
        step = build_step(config, groups, torch.device("cpu"))
        with CheckpointReader(folder) as reader:
            restore_weights(step, reader, logging.getLogger("test"))
        losses.append([run_steps(step, range(1))[0][0] for _ in range(2)])
    return losses


def test_imported_models_train_on_a_layout_from_the_loss_that_transformers_computes(tmp_path: Path) -> None:
    expected, folders = [], []
    for kind in KINDS:
        theirs = save_stock(kind, tmp_path / kind)
        folders.append(import_hf(tmp_path / kind, tmp_path / f"{kind}-imported", seq_length=16).folder)
        batch = batch_of(0, config_of(folders[-1]), 0, 1)
        tokens, labels = (torch.cat([getattr(b, name) for b in batch]) for name in ("tokens", "labels"))
        with torch.no_grad():
            logits = theirs(tokens, use_cache=False).logits
        expected.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item())
    losses = run_distributed(train, LAYOUT.world, folders)[0]
    for kind, (first, second), loss in zip(KINDS, losses, expected, strict=True):
        assert first == pytest.approx(loss, rel=1e-5), kind
        assert second < first, kind
