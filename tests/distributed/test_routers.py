"""Every router, and every scope of the balance loss, gives one process' trajectory on any layout, and none looks at
later tokens. Many configs share a launch, because a launch costs more than a config."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import pytest
from parity import LAYOUTS, SINGLE, Layout, Trajectory, differences, tiny_config, train_all
from test_future_does_not_leak import Observation, compare, observe_all

from moetrain.testing import run_distributed

BOUND = 1e-5
# Rates are high, so that controllers have moved far in five steps.
ROUTERS: dict[str, dict[str, Any]] = {
    "top_k": {
        "type": "top_k",
        "scores": "sigmoid",
        "gates": "renormalized",
        "groups": 2,
        "top_groups": 1,
        "group_score": "max",
    },
    "expert_bias": {"type": "expert_bias", "bias_rate": 0.05, "scaling_factor": 1.5},
    "top_p": {"type": "top_p", "threshold": 0.5, "entropy_loss_coeff": 0.01},
    "relu": {"type": "relu", "l1_coeff_init": 0.01, "mean_k": 1.5, "max_k": 3},
    "relu, each layer": {"type": "relu", "l1_coeff_init": 0.01, "mean_k": 1.5, "mean_over": "layer"},
    "bias_threshold": {"type": "bias_threshold", "bias_rate": 0.02, "mean_k": 1.7},
}
# Two sequences to a micro-batch, so that its scope is none of the other two.
MICRO_BATCH = {"model__moe__aux_loss": "per_micro_batch", "training__micro_batch_size": 2}
GLOBAL_BATCH = {"model__moe__aux_loss": "global_batch", "model__moe__aux_loss_coeff": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "top_k": {},
    "expert_bias": MICRO_BATCH,
    "top_p": GLOBAL_BATCH,
    # At the default eps of 1e-8 Adam makes a whole step of a gradient that is nothing but rounding, and some biases of
    # the hypernetwork, which start at 0, then differ by 1.3e-5 of their size.
    "relu": {**MICRO_BATCH, "model__recompute": "full", "optimizer__eps": 1e-6},
    "relu, each layer": {"optimizer__eps": 1e-6},
    "bias_threshold": GLOBAL_BATCH,
}
NAMES = ("dp2", "tp2+sp x pp2 x ep2")


@lru_cache
def trajectories(layout: Layout) -> dict[str, Trajectory]:
    configs = [tiny_config(layout, model__moe__router=ROUTERS[case], **changes) for case, changes in CASES.items()]
    return dict(zip(CASES, run_distributed(train_all, layout.world, configs)[0], strict=True))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout.name in NAMES], ids=lambda at: at.name)
def test_a_layout_gives_the_trajectory_of_one_process(layout: Layout, case: str) -> None:
    run, reference = trajectories(layout)[case], trajectories(SINGLE)[case]
    assert run.controllers == reference.controllers
    assert max(differences(run, reference)) <= BOUND


def test_controllers_have_moved_in_every_layer() -> None:
    """What the parity runs must exercise, or they would prove less than they say."""
    for case, controller in (
        ("expert_bias", "router.bias"),
        ("top_p", "losses.load"),
        ("relu, each layer", "router.log_l1_coeff"),
        ("bias_threshold", "router.bias"),
        ("bias_threshold", "losses.load"),
    ):
        assert len(set(values_of(case, controller))) > 1
    (penalty,) = set(values_of("relu", "router.log_l1_coeff"))  # one, because it answers for the mean of all layers
    assert penalty != str(math.log(0.01))


def values_of(case: str, controller: str) -> list[str]:
    """Of the three MoE layers."""
    found = trajectories(SINGLE)[case].controllers
    values = [str(value) for name, value in found.items() if name.endswith(f".mlp.{controller}")]
    assert len(values) == 3
    return values


@lru_cache
def observed() -> dict[str, list[Observation]]:
    changes = [{"model__moe__router": router} for router in ROUTERS.values()]
    return dict(zip(ROUTERS, run_distributed(observe_all, 1, changes)[0], strict=True))


@pytest.mark.parametrize("name", ROUTERS)
def test_the_future_does_not_change_the_past(name: str) -> None:
    compare(observed()[name])
