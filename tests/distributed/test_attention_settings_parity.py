"""Norms of queries and keys, biases, and heads of any width: the same on every layout, and the future does not leak."""

from __future__ import annotations

from functools import lru_cache

import pytest
from parity import LAYOUTS, SINGLE, Layout, Trajectory, differences, tiny_config, train_all
from test_future_does_not_leak import compare, observe_all

from moetrain.config.schema import RunConfig
from moetrain.testing import run_distributed

BOUND = 1e-5
BY_NAME = {layout.name: layout for layout in LAYOUTS}
ROUTER = {"type": "expert_bias", "gates": "renormalized", "groups": 2, "top_groups": 1, "top_k": 2}
VARIANTS: dict[str, dict] = {
    "norms of heads": {"model__qk_layernorm": "head", "model__kv_channels": 12, "model__add_qkv_bias": True},
    "norms of projections": {"model__qk_layernorm": "projection", "model__kv_channels": 6},
    "DeepSeek-V3's router": {
        "model__qk_layernorm": "head",
        "model__moe__hyper": None,
        "model__moe__shared_expert_ffn_hidden_size": 24,
        "model__moe__router": ROUTER,
    },
}


def config_of(variant: str, layout: Layout, zero: int) -> RunConfig:
    return tiny_config(layout, zero, **VARIANTS[variant])


@lru_cache
def trajectories(layout: Layout, zero: int) -> dict[str, Trajectory]:
    """All variants in one launch."""
    configs = [config_of(variant, layout, zero) for variant in VARIANTS]
    return dict(zip(VARIANTS, run_distributed(train_all, layout.world, configs)[0], strict=True))


@pytest.mark.parametrize(("name", "zero"), [("tp2+sp x ep2", 2), ("tp2 x ep2", 1)])
def test_a_layout_gives_the_trajectory_of_one_process(name: str, zero: int) -> None:
    runs, references = trajectories(BY_NAME[name], zero), trajectories(SINGLE, 1)
    for variant, reference in references.items():
        assert runs[variant].controllers == reference.controllers, variant
        assert max(differences(runs[variant], reference)) <= BOUND, variant


def test_biases_and_norms_are_learned() -> None:
    weights = trajectories(SINGLE, 1)["norms of heads"].weights
    prefix = "decoder.layers.0.self_attention."
    assert weights[prefix + "linear_qkv.bias"].abs().min() > 0
    for name in ("q_layernorm", "k_layernorm"):
        assert (weights[f"{prefix}{name}.weight"] != 1).all()


def test_the_future_does_not_change_the_past() -> None:
    for observed in run_distributed(observe_all, 1, list(VARIANTS.values()))[0]:
        compare(observed)
