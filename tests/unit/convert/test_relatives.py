"""What the exported modelling code lacks is refused before any work."""

from __future__ import annotations

import pytest

from moetrain.config.model import ModelConfig
from moetrain.convert.hf_config import hf_config
from moetrain.errors import ConversionError

from .conftest import make_model

UNKNOWN = {
    "computation_free": {"copy_experts": 1},
    "capacity": {"factor": 1.0},
    "token_mask": {"frequent_ids": 10, "frequent_experts": 2},
    "router_state": {"type": "gating_residual"},
    "expert_widths": [9, 8, 10, 9, 9],
    "cartesian": {},
}


@pytest.mark.parametrize("setting", UNKNOWN)
def test_a_model_with_a_part_that_the_export_has_not_is_refused_by_the_settings_name(setting: str) -> None:
    tree = make_model("top_k").model_dump()
    tree["moe"][setting] = UNKNOWN[setting]
    with pytest.raises(ConversionError, match=f"nothing for model.moe.{setting}"):
        hf_config(ModelConfig.model_validate(tree))
