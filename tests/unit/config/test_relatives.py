"""Settings of the methods next to HyperMoE and DA-MoE: what they count, and what excludes what."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from moetrain.config.loader import config_from_dict
from moetrain.config.model import ModelConfig
from moetrain.config.relatives import capacities, expected_shares
from moetrain.config.size import flops_per_token, parameter_count
from moetrain.errors import ConfigError


def model(tree: dict[str, Any], **moe: Any) -> ModelConfig:
    tree = copy.deepcopy(tree)
    tree["model"]["moe"] |= moe
    return config_from_dict(tree, "test").model


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"computation_free": {}}, "zero_experts, copy_experts and constant_experts are all 0"),
        ({"capacity": {}}, "set exactly one of factor (None) and tokens (None)"),
        ({"capacity": {"factor": 1.0, "tokens": 4}}, "set exactly one of factor (1.0) and tokens (4)"),
        (
            {"capacity": {"factor": 1.0, "pad": True}, "dispatch": {"max_rows": 64}},
            "dispatch.max_rows (64) would cut",
        ),
        (
            {"token_mask": {"frequent_ids": 9, "frequent_experts": 9}},
            "token_mask.frequent_experts (9) must not exceed num_experts (8)",
        ),
        (
            {"token_mask": {"frequent_ids": 9, "frequent_experts": 2}, "computation_free": {"zero_experts": 1}},
            "token_mask says nothing about the choices of computation_free",
        ),
        (
            {"token_mask": {"frequent_ids": 9, "frequent_experts": 2}, "router": {"type": "expert_bias"}},
            "router.type (expert_bias) as set does not; legal: top_k, da_moe",
        ),
        (
            {
                "token_mask": {"frequent_ids": 9, "frequent_experts": 2},
                "router_state": {"type": "gating_residual"},
                "router": {"type": "top_k"},
            },
            "would hand to the next layer; legal with it: recurrent",
        ),
        (
            {"router": {"type": "expert_bias", "groups": 2}, "computation_free": {"zero_experts": 2}},
            "router.groups (2) are groups of experts",
        ),
        (
            {"router_state": {"type": "gating_residual", "width": 8}},
            "width (8) means nothing with type gating_residual",
        ),
        ({"cartesian": {}, "hyper": {}}, "in a cartesian layer it selects twice"),
        ({"expert_widths": [48] * 7}, "expert_widths has 7 entries; num_experts is 8"),
        ({"expert_widths": [48] * 7 + [40]}, "expert_widths sums to 376; it must keep the size"),
        (
            {"expert_widths": [48] * 8, "dispatch": {"max_rows": 8}},
            "max_rows (8) cuts the rows of experts",
        ),
        ({"router": {"type": "top_k", "top_k": 11}, "computation_free": {"zero_experts": 2}}, "top_k (11) must not"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(tree: dict[str, Any], settings: dict, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        model(tree, **settings)
    assert words in str(caught.value)


def test_a_router_that_does_not_know_masks_is_refused_beside_one(
    tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from moetrain.config.routers import TopKRouterConfig

    monkeypatch.setattr(TopKRouterConfig, "respects_token_mask", False)
    with pytest.raises(ConfigError, match="token_mask needs a router that chooses by its scores alone"):
        model(tree, token_mask={"frequent_ids": 9, "frequent_experts": 2})


def test_a_token_gets_no_more_experts_than_there_are_and_perhaps_none(tree: dict[str, Any]) -> None:
    free = {"zero_experts": 2, "copy_experts": 1}
    moe = model(tree, router={"type": "top_k", "top_k": 10}, computation_free=free).moe
    assert moe is not None
    assert (moe.num_choices, moe.max_top_k, list(moe.selectable)) == (11, 10, [7, 8])
    moe = model(tree, computation_free=free).moe
    assert moe is not None
    assert list(moe.selectable) == [0, 1, 2]


def test_shares_and_capacities_are_those_of_moe_plus_plus(tree: dict[str, Any]) -> None:
    """tau E / (tau E + Z) for the experts (Tab. 1); with top 2 of 8 + 4 choices, tau 0.5, sequences of 32 tokens."""
    moe = model(
        tree,
        computation_free={"zero_experts": 4, "balance_weight": 0.5},
        capacity={"factor": 1.1},
    ).moe
    assert moe is not None
    assert sum(expected_shares(moe)[:8]) == pytest.approx(4 / 8)
    assert moe.expected_mean_k == pytest.approx(1.0)
    # 1.1 x 32 x 2 x 0.5 / 8 = 4.4, and 1.1 x 32 x 2 / 8 = 8.8.
    assert capacities(moe, 32) == [5] * 8 + [9] * 4


def test_without_computation_free_choices_capacity_is_that_of_switch(tree: dict[str, Any]) -> None:
    moe = model(tree, capacity={"factor": 1.25}).moe
    assert moe is not None
    assert capacities(moe, 32) == [10] * 8  # 1.25 x 32 x 2 / 8
    moe = model(tree, capacity={"tokens": 64}).moe
    assert moe is not None
    assert capacities(moe, 32) == [64] * 8


def test_flops_are_six_per_active_matrix_weight_whatever_stands_beside_the_experts(tree: dict[str, Any]) -> None:
    for settings in (
        {"shared_expert_ffn_hidden_size": 24},
        {"expert_widths": [80, 16] * 4},
        {"router_state": {"type": "gating_residual"}},
        {"computation_free": {"zero_experts": 3, "copy_experts": 1}},
    ):
        plain, more = model(tree), model(tree, **settings)
        weights = parameter_count(more).active_per_token - parameter_count(plain).active_per_token
        assert flops_per_token(more) - flops_per_token(plain) == pytest.approx(6 * weights), settings


def test_a_recurrent_router_multiplies_its_own_and_the_shared_weights_in_each_moe_layer(tree: dict[str, Any]) -> None:
    plain, more = model(tree), model(tree, router_state={"type": "recurrent", "width": 16})
    gate = 2 * 16 * 8 - 2 * 64 * 8
    assert flops_per_token(more) - flops_per_token(plain) == 3 * 2 * (gate + 2 * 64 * 16 + 2 * 2 * 16 * 48)


def test_expert_ranks_that_would_differ_in_size_are_refused_and_the_legal_ones_told(tree: dict[str, Any]) -> None:
    tree["model"]["moe"]["expert_widths"] = [80, 16, 64, 32, 48, 48, 48, 48]
    for ranks in (1, 2, 4):
        config_from_dict({**tree, "parallel": {"expert": ranks}}, "test")
    with pytest.raises(ConfigError, match=r"parallel.expert \(8\) must give every rank .*; legal: 1, 2, 4"):
        config_from_dict({**tree, "parallel": {"expert": 8}}, "test")
