"""Relative positions, ReLU and head width: what is refused with its reason, and what models of them count."""

from __future__ import annotations

import math
from typing import Any

import pytest

from moetrain.config.loader import config_from_dict
from moetrain.config.model import ModelConfig
from moetrain.config.size import flops_per_token, parameter_count, parameter_shapes
from moetrain.errors import ConfigError


def model(tree: dict[str, Any], **changes: Any) -> ModelConfig:
    moe = changes.pop("moe", {})
    merged = {**tree["model"], **changes, "moe": {**tree["model"]["moe"], **moe}}
    training = dict(tree["training"])
    if merged.get("type") == "encoder":
        training["objective"] = {"type": "masked_lm"}
    return config_from_dict({**tree, "model": merged, "training": training}, "test").model


ENCODER = {"type": "encoder", "position_embedding": "relative"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"relative_buckets": 16}, "relative_buckets (16) means nothing with position_embedding rope"),
        ({"position_embedding": "relative", "rotary_base": 5.0}, "rotary_base (5.0) means nothing with"),
        ({**ENCODER, "relative_buckets": 7}, "relative_buckets (7) must be an even number from 4 on (type encoder)"),
        ({"position_embedding": "relative", "relative_buckets": 1}, "must be 2 or more (type decoder)"),
        ({**ENCODER, "relative_max_distance": 8}, "must exceed the 8 distances that have a row of their own"),
        ({"kv_channels": 7}, "kv_channels (7) must be even for rotary positions"),
        ({"num_attention_heads": 6, "num_query_groups": 6}, "or set kv_channels"),
        ({"activation": "relu", "moe": {"dispatch": {"max_rows": 9}}}, "activation relu has none; remove one"),
        (
            {"moe": {"capacity": {"tokens": 9, "order": "probability"}}},
            "the future would change the past; legal here: position",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused_with_the_reason(
    tree: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as error:
        model(tree, **changes)
    assert words in str(error.value)


def test_zero_3_and_recompute_do_not_share_a_table_of_positions(tree: dict[str, Any]) -> None:
    tree["model"] |= {"moe": None, "position_embedding": "relative", "recompute": "full"}
    with pytest.raises(ConfigError, match="gets one from each recomputed layer; legal: 0, 1, 2"):
        config_from_dict({**tree, "zero": {"stage": 3}}, "test")
    tree["model"]["recompute"] = "none"
    config_from_dict({**tree, "zero": {"stage": 3}}, "test")


def test_what_works_together_is_legal(tree: dict[str, Any]) -> None:
    model(tree, position_embedding="relative", kv_channels=7, relative_buckets=7, relative_max_distance=9)
    model(tree, num_attention_heads=6, num_query_groups=3, kv_channels=8)
    model(tree, **ENCODER, activation="relu", moe={"capacity": {"factor": 1.0, "order": "probability", "pad": True}})


def test_parameters_and_operations_are_counted(tree: dict[str, Any]) -> None:
    """d=64 H=4 G=2 hd=10 ffn=96 V=512 E=8 f=48, layers 1 and 3 of 4 MoE with top 2; shared expert of 5."""
    relu = model(
        tree,
        **ENCODER,
        activation="relu",
        kv_channels=10,
        relative_buckets=12,
        moe={"shared_expert_ffn_hidden_size": 5, "expert_widths": [40, 56] * 4},
    )
    count = parameter_count(relu)
    assert count.attention == 4 * (8 * 10 * 64 + 64 * 40) + 12 * 4
    assert count.expert == 2 * 8 * 2 * 48 * 64
    assert count.mlp == 2 * 2 * 96 * 64 + 2 * (8 * 64 + 2 * 5 * 64) + 9 * 64
    assert count.total == sum(math.prod(shape) for _, shape in parameter_shapes(relu))
    attention = 2 * 64 * (80 + 40) + 4 * 32 * 40
    layers = 4 * attention + 2 * 4 * 64 * 96 + 2 * (2 * 4 * 64 * 48 + 2 * 8 * 64 + 4 * 64 * 5)
    assert flops_per_token(relu) == 3 * (layers + 2 * 64 * 512)
