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
from moetrain.config.model import ModelConfig
from moetrain.config.schema import ParallelConfig, RunConfig
from moetrain.convert.from_hf import import_hf
from moetrain.convert.hf_config import hf_config
from moetrain.convert.hf_modeling.modeling_moetrain import MoetrainForCausalLM
from moetrain.model.parameters import named_controllers
from moetrain.moe.thresholds import QuantileState
from moetrain.runtime.groups import create_groups
from moetrain.testing import run_distributed
from moetrain.train.setup import build_step
from moetrain.train.state import restore_weights

KINDS = ("mixtral-wide-heads", "qwen3_moe-dense-layers", "olmoe", "dots1", "deepseek_v3", "deepseek_v2")
OWN = ModelConfig.model_validate(
    {"num_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 48}
    | {"vocab_size": 96, "seq_length": 64}
    | {
        "moe": {
            "num_experts": 4,
            "ffn_hidden_size": 24,
            "layer_freq": [1, 0, 1],
            "router": {"type": "da_moe", "importance": "row_max", "mean_k": 2.0},
            "hyper": {"bottleneck": 3, "hidden": 7, "expert_embedding": 5, "process": 6, "condition": 4},
        }
    }
)
VISITS = 7.0
LAYOUT = next(layout for layout in LAYOUTS if layout.name == "tp2+sp x ep2")


def config_of(folder: Path) -> RunConfig:
    with CheckpointReader(folder) as reader:
        run = config_from_dict(reader.config, "manifest")
    parallel = ParallelConfig(tensor=LAYOUT.tensor, sequence=LAYOUT.sequence, expert=LAYOUT.expert)
    training = run.training.model_copy(update={"precision": "fp32"})
    return run.model_copy(update={"parallel": parallel, "training": training})


def save_own(folder: Path) -> torch.nn.Module:
    """A HyperMoE with DA-MoE's budgets in the middle of a training, as its export."""
    torch.manual_seed(0)
    model = MoetrainForCausalLM(hf_config(OWN)).eval()
    state = QuantileState.initial(OWN.moe.router.shares(4), 1)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            values = {"thresholds": state.thresholds() + 0.5, "quartiles": state.quartiles_B2 + 0.5}
            values |= {"offsets": state.offsets_BM, "visits": state.visits_B + VISITS, "threshold": torch.tensor(0.6)}
            buffer.copy_(values[name.rpartition(".")[2]])
    model.save_pretrained(folder)
    return model


def train(folders: list[Path]) -> tuple[list[list[float]], list[float]]:
    """Losses of two steps on the same batch from each folder; and of the last one's controllers here, how many steps
    they count."""
    configs = [config_of(folder) for folder in folders]
    groups = create_groups(layout_of(configs[0]), seed=1)
    losses = []
    for folder, config in zip(folders, configs, strict=True):
        step = build_step(config, groups, torch.device("cpu"))
        with CheckpointReader(folder) as reader:
            restore_weights(step, reader, logging.getLogger("test"))
        losses.append([run_steps(step, range(1))[0][0] for _ in range(2)])
        visits = [float(value) for name, value in named_controllers(step.chunks) if name.endswith("visits")]
    return losses, visits


def test_imported_models_train_on_a_layout_from_the_loss_that_transformers_computes(tmp_path: Path) -> None:
    expected, folders = [], []
    for kind in (*KINDS, "moetrain"):
        theirs = save_own(tmp_path / kind) if kind == "moetrain" else save_stock(kind, tmp_path / kind)
        folders.append(import_hf(tmp_path / kind, tmp_path / f"{kind}-imported", seq_length=16).folder)
        batch = batch_of(0, config_of(folders[-1]), 0, 1)
        tokens, labels = (torch.cat([getattr(b, name) for b in batch]) for name in ("tokens", "labels"))
        with torch.no_grad():
            logits = theirs(tokens, use_cache=False).logits
        expected.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item())
    losses, visits = run_distributed(train, LAYOUT.world, folders)[0]
    for folder, (first, second), loss in zip(folders, losses, expected, strict=True):
        assert first == pytest.approx(loss, rel=1e-5), folder.name
        assert second < first, folder.name
    assert visits == [VISITS + 2] * 2  # of our own export: its controllers went on from where they stood
