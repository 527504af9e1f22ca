"""The neighbors of both papers in encoders and beside padding: parity of layouts, and padding that changes nothing."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from encoders import assert_same, classifier_config, encoder_config, train
from parity import LAYOUTS, SINGLE, Layout
from test_encoder_model import CHANGED, LENGTH, padded_variations

from moetrain.config.schema import RunConfig
from moetrain.testing import run_distributed

BY_NAME = {layout.name: layout for layout in [SINGLE, *LAYOUTS]}
STATE = {"type": "recurrent", "width": 6}
VARIANTS: dict[str, dict[str, Any]] = {
    "masked": {
        "router": {"type": "expert_bias", "top_k": 3},
        "computation_free": {"copy_experts": 1, "constant_experts": 2, "balance_weight": 0.5},
        "aux_loss": "global_batch",
        "router_state": STATE,
    },
    "classes": {
        "token_mask": {"frequent_ids": 20, "frequent_experts": 3},
        "capacity": {"tokens": 4},
        "router_state": STATE,
        "shared_expert_ffn_hidden_size": 10,
    },
    "classes, two mixtures": {
        "hyper": None,
        "cartesian": {"residual": "inner"},
        "capacity": {"factor": 0.6, "pad": True},
        "computation_free": {"zero_experts": 2, "gates": "nonzero"},
        "shared_expert_ffn_hidden_size": 10,
    },
}


def config_of(variant: str, layout: Layout = SINGLE, **more: Any) -> RunConfig:
    make = encoder_config if variant.startswith("masked") else classifier_config
    # Above what is nothing but rounding in the gradient of the hypernetwork's biases, which start at zero.
    changes: dict[str, Any] = {f"model__moe__{name}": value for name, value in VARIANTS[variant].items()}
    return make(layout, **{**changes, "optimizer__eps": 1e-5, **more})


@lru_cache
def runs(layout: str) -> dict[str, dict[str, Any]]:
    """All variants in one launch."""
    at = BY_NAME[layout]
    return dict(zip(VARIANTS, run_distributed(train, at.world, [config_of(v, at) for v in VARIANTS])[0], strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layout_gives_the_trajectory_of_one_process(variant: str) -> None:
    assert_same(runs("tp2+sp x pp2 x ep2")[variant], runs("single")[variant])


def test_padding_makes_no_choice() -> None:
    for variant in ("classes", "classes, two mixtures"):
        assert all(sum(histogram) < 8 * 16 for histogram in runs("single")[variant]["histograms"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_changes_no_bit_of_a_text_and_a_text_none_of_its_neighbor(variant: str) -> None:
    config = config_of(variant, model__seq_length=LENGTH)
    (hidden, _), (same_hidden, _), (other_hidden, _) = run_distributed(padded_variations, 1, config)[0]
    assert torch.equal(hidden[:CHANGED, 0], same_hidden[:CHANGED, 0])
    assert torch.equal(hidden[:40, 1], same_hidden[:40, 1])
    assert torch.equal(hidden[:40, 1], other_hidden[:40, 1])
    assert not torch.equal(hidden[0, 0], other_hidden[0, 0])  # an encoder's first token sees the last one
