"""The neighbors of both papers on split models: the same trajectory as one process, and no look into the future."""

from __future__ import annotations

import pytest
from parity import LAYOUTS, SINGLE, Layout, Trajectory, differences, tiny_config, train_all
from test_future_does_not_leak import compare, observe_all

from moetrain.testing import run_distributed

BOUND = 1e-5
BY_NAME = {layout.name: layout for layout in LAYOUTS}
TOP_2 = {"type": "top_k", "top_k": 2}
FREE = {"zero_experts": 1, "copy_experts": 1, "constant_experts": 2}
HYPER = {"bottleneck": 4, "hidden": 8, "expert_embedding": 6, "process": 10, "condition": 8, "layer_embedding": 4}
MASK = {"frequent_ids": 20, "frequent_experts": 3, "rare_experts": 1}

# The tiny model routes by DA-MoE and has a hyper-expert, unless a variant says otherwise.
VARIANTS: dict[str, dict] = {
    "computation-free": {"computation_free": {**FREE, "balance_weight": 0.5}},
    "null experts": {
        "router": {**TOP_2, "top_k": 3},
        "computation_free": {"zero_experts": 3, "gates": "nonzero", "pooled_balance": True},
    },
    "capacity": {"capacity": {"factor": 0.7}},
    "capacity, padded": {"capacity": {"factor": 0.7, "pad": True}},
    "capacity, computation-free": {"computation_free": {**FREE, "balance_weight": 0.5}, "capacity": {"factor": 0.8}},
    "token mask": {"token_mask": MASK},
    "recurrent": {"router_state": {"type": "recurrent", "width": 6}},
    "gating residual": {"computation_free": FREE, "router_state": {"type": "gating_residual"}},
    "diverse sizes": {"expert_widths": [40, 8, 24, 24]},
    "cartesian": {
        "cartesian": {"residual": "inner"},
        "hyper": None,
        "router_state": {"type": "recurrent", "width": 6},
        "shared_expert_ffn_hidden_size": 10,
    },
    "shared expert": {"router": TOP_2, "shared_expert_ffn_hidden_size": 10},
    "thresholds over all choices, balanced over the batch": {
        "router": {"type": "bias_threshold", "mean_k": 2.5, "bias_rate": 0.01},
        "computation_free": {**FREE, "balance_weight": 0.5},
        "aux_loss": "global_batch",
        "hyper": {**HYPER, "aggregation": "prob", "coefficient": "selected_probability"},
    },
    "sigmoid scores of groups, masked": {
        "router": {**TOP_2, "scores": "sigmoid", "gates": "renormalized", "groups": 2, "top_groups": 1},
        "token_mask": MASK,
    },
    "a learned importance of the router's state": {
        "router": {"type": "da_moe", "importance": "predicted", "mean_k": 2.0},
        "router_state": {"type": "gating_residual"},
    },
}


def config_changes(variant: str) -> dict:
    changes: dict = {f"model__moe__{name}": value for name, value in VARIANTS[variant].items()}
    # At the default eps Adam makes a whole step of a gradient that is little but rounding: here that of a bias of the
    # hypernetwork, which starts at zero, and whose relative difference was 1.5e-5.
    return {**changes, "optimizer__eps": 1e-5}


_runs: dict[tuple[str, str], dict[str, Trajectory]] = {}


def trajectories(layout: Layout, recompute: str = "none") -> dict[str, Trajectory]:
    """All variants in one launch of the layout."""
    if (layout.name, recompute) not in _runs:
        changes = [{**config_changes(variant), "model__recompute": recompute} for variant in VARIANTS]
        runs = run_distributed(train_all, layout.world, [tiny_config(layout, 1, **c) for c in changes])[0]
        _runs[layout.name, recompute] = dict(zip(VARIANTS, runs, strict=True))
    return _runs[layout.name, recompute]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("layout", "recompute"),
    [("ep2", "none"), ("tp2", "none"), ("pp2 interleaved", "none"), ("tp2+sp x pp2 x ep2", "full")],
)
def test_a_layout_gives_the_trajectory_of_one_process(layout: str, recompute: str, variant: str) -> None:
    reference = trajectories(SINGLE)[variant]
    run = trajectories(BY_NAME[layout], recompute)[variant]
    assert run.controllers == reference.controllers
    assert max(differences(run, reference)) <= BOUND


def test_zero_2_waits_for_all_layers_gradients_of_the_recurrent_routers_cell() -> None:
    layout = BY_NAME["pp2 interleaved"]
    run = run_distributed(train_all, layout.world, [tiny_config(layout, 2, **config_changes("recurrent"))])[0][0]
    assert max(differences(run, trajectories(SINGLE)["recurrent"])) <= BOUND


def test_padded_exchange_gives_the_losses_of_the_plain_one_to_the_bit() -> None:
    for layout, recompute in (("ep2", "none"), ("tp2+sp x pp2 x ep2", "full")):
        runs = trajectories(BY_NAME[layout], recompute)
        assert runs["capacity, padded"].losses[0] == runs["capacity"].losses[0]
        assert max(differences(runs["capacity, padded"], runs["capacity"])) <= BOUND


def test_the_variants_differ_from_one_another() -> None:
    losses = {variant: run.losses[-1] for variant, run in trajectories(SINGLE).items()}
    assert len(set(losses.values())) >= len(losses) - 1  # padding changes nothing


def test_later_tokens_change_no_bit_of_earlier_ones() -> None:
    changes = [config_changes(variant) for variant in VARIANTS]
    for variant, seen in zip(VARIANTS, run_distributed(observe_all, 1, changes)[0], strict=True):
        compare(seen, routers=6 if "cartesian" in variant else 3)
