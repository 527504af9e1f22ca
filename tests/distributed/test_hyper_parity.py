"""Layout parity of HyperMoE's variants: whoever shares a hypernetwork, and wherever its layers lie, one process's
trajectory comes out."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from parity import LAYOUTS, SINGLE, Layout, Trajectory, differences, layout_of, tiny_config, train_all, whole_weights

from moetrain.config.size import parameter_shapes
from moetrain.model.parameters import describe_parameters
from moetrain.runtime.groups import create_groups
from moetrain.testing import run_distributed
from moetrain.train.setup import build_step

BOUND = 1e-5
PP4 = Layout("pp4", 4, pipeline=4)
BY_NAME = {layout.name: layout for layout in [*LAYOUTS, PP4]}
ALL_MOE = [1, 1, 1, 1]
# Name: ZeRO stage, what model.moe.layer_freq is, and the settings of model.moe.hyper beside the sizes.
VARIANTS: dict[str, tuple[int, list[int], dict[str, Any]]] = {
    "stages": (1, ALL_MOE, {"sharing": "stage", "stages": 2}),
    "stages, ZeRO-2, recompute": (2, ALL_MOE, {"sharing": "stage", "stages": 2, "recompute": True}),
    "one a layer": (1, [1, 0, 1, 1], {"sharing": "layer"}),
    "embeddings of the model": (2, [1, 0, 1, 1], {"embeddings": "model"}),
    "network a layer, embeddings of the model": (0, ALL_MOE, {"sharing": "layer", "embeddings": "model"}),
    "a pipeline stage without experts": (1, [1, 1, 0, 0], {"embeddings": "model", "layer_embedding": 0}),
    "per token": (2, [1, 0, 1, 1], {"aggregation": "prob", "coefficient": "selected_probability"}),
    "selected": (1, [1, 0, 1, 1], {"condition_on": "selected", "aggregation": "sum", "recompute": True}),
    "random": (1, [1, 0, 1, 1], {"condition_on": "random_fixed", "sharing": "stage", "stages": 1}),
    "constant": (1, [1, 0, 1, 1], {"condition_on": "constant", "embeddings": "model"}),
    "static": (2, [1, 0, 1, 1], {"condition_on": "static", "coefficient": "selected_probability"}),
}
SIZES = {"bottleneck": 4, "hidden": 8, "expert_embedding": 6, "process": 10, "condition": 8, "layer_embedding": 4}


def config_of(layout: Layout, variant: str) -> Any:
    zero, layer_freq, hyper = VARIANTS[variant]
    # At the default of 1e-8 Adam makes a whole step of a gradient that is nothing but rounding: weights of a hidden
    # unit that hardly any set activates then differ by up to 3e-5, where the first step's norms agree to 1e-8.
    changes = {"model__moe__layer_freq": layer_freq, "model__moe__hyper": SIZES | hyper, "optimizer__eps": 1e-6}
    return tiny_config(layout, zero, **changes)


@lru_cache
def trajectories(layout: Layout) -> dict[str, Trajectory]:
    """All variants in one launch of the layout."""
    runs = run_distributed(train_all, layout.world, [config_of(layout, variant) for variant in VARIANTS])[0]
    return dict(zip(VARIANTS, runs, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["pp2", "pp2 interleaved", "pp4", "pp2 x ep2", "tp2+sp x pp2 x ep2"])
def test_a_variant_gives_the_trajectory_of_one_process_on_every_layout(name: str, variant: str) -> None:
    run, reference = trajectories(BY_NAME[name])[variant], trajectories(SINGLE)[variant]
    assert run.controllers == reference.controllers
    assert max(differences(run, reference)) <= BOUND


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_weights_are_those_that_the_config_counts(variant: str) -> None:
    shapes = {name: tuple(weight.shape) for name, weight in trajectories(SINGLE)[variant].weights.items()}
    assert shapes == dict(parameter_shapes(config_of(SINGLE, variant).model))


def test_every_variant_is_another_model() -> None:
    """Each setting must reach the model, or parity would prove nothing about it."""
    losses = [tuple(run.losses) for run in trajectories(SINGLE).values()]
    assert len({loss[-1] for loss in losses}) == len(losses) - 1, "only the two runs with equal stages may agree"
    assert trajectories(SINGLE)["stages"].losses == trajectories(SINGLE)["stages, ZeRO-2, recompute"].losses


def held(layout: Layout, variant: str) -> dict[str, Any]:
    """This rank's shared parameters (by the first part of the name) and the stages that it shares them with."""
    config = config_of(layout, variant)
    step = build_step(config, create_groups(layout_of(config), seed=1), torch.device("cpu"))
    infos = describe_parameters(step.chunks, step.groups, sequence_parallel=False)
    whole_weights(step)  # somebody holds each, and copies are equal
    return {info.name.rpartition(".input")[0]: info.tied for info in infos if info.name.endswith(".input.weight")}


def test_a_pipeline_rank_holds_the_hypernetworks_of_its_layers_and_no_other() -> None:
    assert run_distributed(held, 4, PP4, "stages") == [
        {"hypernetworks.0": (0, 1)},
        {"hypernetworks.0": (0, 1)},
        {"hypernetworks.1": (2, 3)},
        {"hypernetworks.1": (2, 3)},
    ]
    shared, none = {"hypernetwork": (0, 2, 3)}, {}
    assert run_distributed(held, 4, PP4, "embeddings of the model") == [shared, none, shared, shared]
