"""What Switch Transformers bring, on split models: the same trajectory as one process, and no look into the future."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
from encoders import assert_same, classifier_config, encoder_config, train
from parity import LAYOUTS, SINGLE, Layout
from test_future_does_not_leak import compare, observe_all

from moetrain.config.schema import RunConfig
from moetrain.testing import run_distributed

BY_NAME = {layout.name: layout for layout in [SINGLE, *LAYOUTS]}
RELATIVE: dict[str, Any] = {
    "model__position_embedding": "relative",
    "model__relative_buckets": 8,
    "model__relative_max_distance": 12,
    "model__activation": "relu",
    "model__kv_channels": 6,
}
SWITCH = RELATIVE | {
    "model__num_query_groups": None,
    "model__moe__router": {"type": "top_k", "top_k": 1},
    "model__moe__capacity": {"tokens": 4, "dropped": "input"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "masked": RELATIVE | {"model__recompute": "full"},
    "masked, as Switch": SWITCH,
    "classes, by probability": RELATIVE | {"model__moe__capacity": {"tokens": 5, "order": "probability", "pad": True}},
    "masked, cartesian": RELATIVE | {"model__moe__cartesian": {"residual": "inner"}, "model__moe__hyper": None},
    "classes, diverse": RELATIVE
    | {"model__moe__expert_widths": [40, 8, 24, 24], "model__moe__shared_expert_ffn_hidden_size": 10},
}


def config_of(layout: Layout, zero: int, variant: str) -> RunConfig:
    make = encoder_config if variant.startswith("masked") else classifier_config
    return make(layout, zero, **VARIANTS[variant])


@lru_cache
def runs(layout: str, zero: int) -> dict[str, dict[str, Any]]:
    """All variants of a layout, in one launch."""
    at = BY_NAME[layout]
    results = run_distributed(train, at.world, [config_of(at, zero, variant) for variant in VARIANTS])[0]
    return dict(zip(VARIANTS, results, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("layout", "zero"), [("tp2+sp x ep2", 1), ("pp2 interleaved", 2), ("dp2", 2)])
def test_a_layout_gives_the_trajectory_of_one_process(layout: str, zero: int, variant: str) -> None:
    assert_same(runs(layout, zero)[variant], runs("single", 1)[variant])


def test_the_table_of_positions_learns() -> None:
    weights = [runs("single", 1)[variant]["weights"]["relative_positions.weight"] for variant in VARIANTS]
    assert len({float(table.norm()) for table in weights}) == len(VARIANTS)


def test_later_tokens_change_no_bit_of_earlier_ones() -> None:
    routers = [{"type": "da_moe", "importance": name, "mean_k": 2.0} for name in ("self_weight", "row_entropy")]
    changes = [
        RELATIVE | {"model__moe__router": router, "model__moe__capacity": {"tokens": 9, "dropped": "input"}}
        for router in [*routers, {"type": "top_k", "top_k": 1}]
    ]
    for seen in run_distributed(observe_all, 1, changes)[0]:
        compare(seen)
