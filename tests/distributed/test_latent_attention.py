"""Multi-head latent attention: the same on every layout, right by itself, and the future does not leak."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from parity import (
    LAYOUTS,
    SINGLE,
    STEPS,
    Layout,
    Trajectory,
    differences,
    layout_of,
    run_steps,
    tiny_config,
    train_all,
    whole_controllers,
    whole_weights,
)
from test_future_does_not_leak import compare, observe_all
from test_zero3 import DP2, assert_close, dense, train

from moetrain.checkpoint.comm import TorchDistributed
from moetrain.checkpoint.manager import CheckpointManager
from moetrain.config.loader import config_to_dict
from moetrain.config.schema import RunConfig
from moetrain.config.size import parameter_shapes
from moetrain.runtime.groups import create_groups
from moetrain.testing import run_distributed
from moetrain.train.setup import build_step
from moetrain.train.state import collect_pieces, restore

BOUND = 1e-5
HALF = 3
BY_NAME = {layout.name: layout for layout in [SINGLE, *LAYOUTS]}
LATENT = {"kv_lora_rank": 9, "qk_head_dim": 6, "qk_pos_emb_head_dim": 4, "v_head_dim": 7}
YARN = {"factor": 4.0, "original_max_position_embeddings": 8, "mscale": 0.7, "mscale_all_dim": 1.0}
ROUTER = {"type": "expert_bias", "gates": "renormalized", "groups": 2, "top_groups": 1, "top_k": 2}
BATCH = 4
# Without the hyper-expert, whose tiny first weights Adam would make the largest difference of all layouts; its
# gradients beside latent attention are compared in test_gradient_parity.py.
BASE = {"model__num_query_groups": None, "model__moe__hyper": None, "training__global_batch_size": BATCH}
IMPORTANCE, DEEPSEEK, HALVES = "importance of each token", "DeepSeek-V3", "values wider than keys, halves rotate"
VARIANTS: dict[str, dict] = {
    IMPORTANCE: {
        "model__multi_latent_attention": LATENT | {"q_lora_rank": 11},
    },
    DEEPSEEK: {
        "model__multi_latent_attention": LATENT | {"q_lora_rank": 10, "yarn": YARN},
        "model__moe__shared_expert_ffn_hidden_size": 24,
        "model__moe__router": ROUTER,
    },
    HALVES: {
        "model__multi_latent_attention": LATENT | {"v_head_dim": 12, "rotary_interleaved": False},
        "model__recompute": "full",
    },
}
ON_LAYOUTS = {
    "tp2 x ep2": (1, (IMPORTANCE, HALVES)),
    "tp2+sp x pp2 interleaved x ep2": (2, (IMPORTANCE, DEEPSEEK)),
}


def config_of(variant: str, layout: Layout, zero: int) -> RunConfig:
    return tiny_config(layout, zero, **BASE, **VARIANTS[variant])


@lru_cache
def trajectories(layout: Layout, zero: int, variants: tuple[str, ...]) -> dict[str, Trajectory]:
    """All of them in one launch."""
    configs = [config_of(variant, layout, zero) for variant in variants]
    return dict(zip(variants, run_distributed(train_all, layout.world, configs)[0], strict=True))


def references() -> dict[str, Trajectory]:
    return trajectories(SINGLE, 1, tuple(VARIANTS))


@pytest.mark.parametrize("name", ON_LAYOUTS)
def test_a_layout_gives_the_trajectory_of_one_process(name: str) -> None:
    for variant, run in trajectories(BY_NAME[name], *ON_LAYOUTS[name]).items():
        reference = references()[variant]
        assert run.controllers == reference.controllers, variant
        assert max(differences(run, reference)) <= BOUND, variant


def test_the_model_has_the_parameters_that_the_config_counts_and_all_of_them_learn() -> None:
    for variant, trajectory in references().items():
        expected = dict(parameter_shapes(config_of(variant, SINGLE, 1).model))
        assert {name: tuple(weight.shape) for name, weight in trajectory.weights.items()} == expected
        for name, weight in trajectory.weights.items():
            if name.endswith(("q_layernorm.weight", "kv_layernorm.weight")):
                assert (weight != 1).all(), name


def save_halfway(config: RunConfig, folder: Path) -> None:
    step = build_step(config, create_groups(layout_of(config), seed=1), torch.device("cpu"))
    run_steps(step, range(HALF))
    manager = CheckpointManager(folder, keep_last=1, comm=TorchDistributed())
    extra = {"optimizer_steps": HALF}
    manager.save(HALF, HALF * BATCH, collect_pieces(step), config_to_dict(config), {"name": "saved"}, extra)


def go_on(config: RunConfig, folder: Path) -> Trajectory:
    step = build_step(config, create_groups(layout_of(config), seed=1), torch.device("cpu"))
    reader = CheckpointManager(folder, keep_last=1, comm=TorchDistributed()).open()
    assert reader is not None and reader.step == HALF
    with reader:
        restore(step, reader, {"name": "loaded"}, logging.getLogger("test"))
    losses, norms = run_steps(step, range(HALF, STEPS))
    return Trajectory(losses, norms, whole_weights(step), whole_controllers(step))


def test_a_checkpoint_goes_on_on_another_layout(tmp_path: Path) -> None:
    layout = BY_NAME["tp2+sp x ep2"]
    run_distributed(save_halfway, layout.world, config_of(DEEPSEEK, layout, 2), tmp_path)
    run = run_distributed(go_on, 1, config_of(DEEPSEEK, SINGLE, 1), tmp_path)[0]
    whole = references()[DEEPSEEK]
    rest = Trajectory(whole.losses[HALF:], whole.norms[HALF:], whole.weights, whole.controllers)
    assert run.controllers == rest.controllers
    assert max(differences(run, rest)) <= BOUND


def test_zero_3_trains_as_one_process() -> None:
    changes = {"model__num_query_groups": None, "model__multi_latent_attention": LATENT | {"q_lora_rank": 11}}
    (reference,) = run_distributed(train, 1, [dense(SINGLE, 1, **changes)])[0]
    (record,) = run_distributed(train, DP2.world, [dense(DP2, 3, **changes)])[0]
    assert_close(record, reference)


def test_the_future_does_not_change_the_past() -> None:
    for observed in run_distributed(observe_all, 1, [BASE | changes for changes in VARIANTS.values()])[0]:
        compare(observed)
