"""Multi-head latent attention: the same on every layout, right by itself, and the future does not leak."""

from __future__ import annotations

from functools import lru_cache

import pytest
from parity import LAYOUTS, SINGLE, Layout, Trajectory, differences, tiny_config, train_all
from test_future_does_not_leak import compare, observe_all
from test_zero3 import DP2, assert_close, dense, train

from moetrain.config.schema import RunConfig
from moetrain.config.size import parameter_shapes
from moetrain.testing import run_distributed

BOUND = 1e-5
BY_NAME = {layout.name: layout for layout in [SINGLE, *LAYOUTS]}
LATENT = {"kv_lora_rank": 9, "qk_head_dim": 6, "qk_pos_emb_head_dim": 4, "v_head_dim": 7}
YARN = {"factor": 4.0, "original_max_position_embeddings": 8, "mscale": 0.7, "mscale_all_dim": 1.0}
ROUTER = {"type": "expert_bias", "gates": "renormalized", "groups": 2, "top_groups": 1, "top_k": 2}
BASE = {"model__num_query_groups": None, "model__layernorm_epsilon": 1e-6}
VARIANTS: dict[str, dict] = {
    "latents for queries too, importance of each token": {
        "model__multi_latent_attention": LATENT | {"q_lora_rank": 11},
    },
    "DeepSeek-V3": {
        "model__multi_latent_attention": LATENT | {"q_lora_rank": 10, "yarn": YARN},
        "model__moe__hyper": None,
        "model__moe__shared_expert_ffn_hidden_size": 24,
        "model__moe__router": ROUTER,
    },
    "values wider than keys, halves rotate": {
        "model__multi_latent_attention": LATENT | {"v_head_dim": 12, "rotary_interleaved": False},
        "model__recompute": "full",
    },
}


def config_of(variant: str, layout: Layout, zero: int) -> RunConfig:
    return tiny_config(layout, zero, **BASE, **VARIANTS[variant])


@lru_cache
def trajectories(layout: Layout, zero: int) -> dict[str, Trajectory]:
    """All variants in one launch."""
    configs = [config_of(variant, layout, zero) for variant in VARIANTS]
    return dict(zip(VARIANTS, run_distributed(train_all, layout.world, configs)[0], strict=True))


@pytest.mark.parametrize(("name", "zero"), [("tp2 x ep2", 1), ("tp2+sp x pp2 interleaved x ep2", 2)])
def test_a_layout_gives_the_trajectory_of_one_process(name: str, zero: int) -> None:
    runs, references = trajectories(BY_NAME[name], zero), trajectories(SINGLE, 1)
    for variant, reference in references.items():
        assert runs[variant].controllers == reference.controllers, variant
        assert max(differences(runs[variant], reference)) <= BOUND, variant


def test_the_model_has_the_parameters_that_the_config_counts_and_all_of_them_learn() -> None:
    for variant, trajectory in trajectories(SINGLE, 1).items():
        expected = dict(parameter_shapes(config_of(variant, SINGLE, 1).model))
        assert {name: tuple(weight.shape) for name, weight in trajectory.weights.items()} == expected
        for name, weight in trajectory.weights.items():
            if name.endswith(("q_layernorm.weight", "kv_layernorm.weight")):
                assert (weight != 1).all(), name


def test_zero_3_trains_as_one_process() -> None:
    changes = {"model__num_query_groups": None, "model__multi_latent_attention": LATENT | {"q_lora_rank": 11}}
    (reference,) = run_distributed(train, 1, [dense(SINGLE, 1, **changes)])[0]
    (record,) = run_distributed(train, DP2.world, [dense(DP2, 3, **changes)])[0]
    assert_close(record, reference)


def test_the_future_does_not_change_the_past() -> None:
    for observed in run_distributed(observe_all, 1, [BASE | changes for changes in VARIANTS.values()])[0]:
        compare(observed)
