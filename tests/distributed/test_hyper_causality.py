"""No variant of HyperMoE lets a later token change a bit of an earlier one."""

from __future__ import annotations

from typing import Any

import pytest
from test_future_does_not_leak import check

SIZES = {"bottleneck": 4, "hidden": 8, "expert_embedding": 6, "process": 10, "condition": 8, "layer_embedding": 4}


@pytest.mark.parametrize(
    "choices",
    [
        {"condition_on": "selected", "form": "grouped"},
        {"condition_on": "selected", "form": "factorized", "aggregation": "sum"},
        {"aggregation": "prob", "coefficient": "selected_probability"},
        {"condition_on": "selected", "aggregation": "prob"},
        {"condition_on": "random_fixed", "embeddings": "model", "form": "grouped"},
        {"condition_on": "constant", "coefficient": "selected_probability"},
        {"condition_on": "static", "coefficient": "selected_probability"},
        {"sharing": "layer", "recompute": True, "form": "grouped"},
    ],
    ids=lambda choices: "-".join(map(str, choices.values())),
)
def test_no_variant_lets_the_future_change_the_past(choices: dict[str, Any]) -> None:
    check({"model__moe__hyper": SIZES | choices})
