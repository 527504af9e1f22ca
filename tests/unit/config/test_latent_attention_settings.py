"""Multi-head latent attention in the config: what is refused with its reason, and what such a model counts."""

from __future__ import annotations

import math
from typing import Any

import pytest

from moetrain.config.loader import config_from_dict
from moetrain.config.model import ModelConfig
from moetrain.config.registry import nearest_setting
from moetrain.config.size import flops_per_token, parameter_count, parameter_shapes
from moetrain.errors import ConfigError

LATENT = {"kv_lora_rank": 24, "qk_head_dim": 10, "qk_pos_emb_head_dim": 6, "v_head_dim": 12}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}


def model(tree: dict[str, Any], latent: dict[str, Any], **changes: Any) -> ModelConfig:
    plain = {"num_query_groups": None, "multi_latent_attention": LATENT | latent}
    return config_from_dict({**tree, "model": {**tree["model"], **plain, **changes}}, "test").model


@pytest.mark.parametrize(
    ("latent", "changes", "words"),
    [
        ({"qk_pos_emb_head_dim": 5}, {}, "qk_pos_emb_head_dim (5) must be even for rotary positions"),
        ({}, {"num_query_groups": 2}, "num_query_groups (2) cannot stand beside multi_latent_attention: every head"),
        ({}, {"kv_channels": 16}, "kv_channels (16) cannot stand beside multi_latent_attention: the widths are"),
        ({}, {"add_qkv_bias": True}, "add_qkv_bias (True) cannot stand beside multi_latent_attention: its projections"),
        ({}, {"qk_layernorm": "head"}, "qk_layernorm (head) cannot stand beside multi_latent_attention: it has norms"),
        ({}, {"position_embedding": "relative"}, "position_embedding (relative) cannot stand beside"),
        ({"yarn": YARN | {"beta_fast": 1.0}}, {}, "beta_fast (1) must exceed beta_slow (1)"),
        ({"yarn": YARN | {"factor": 0.5}}, {}, "model.multi_latent_attention.yarn.factor"),
        ({"yarn": YARN}, {"rotary_base": 1.0}, "rotary_base (1) must exceed 1 with multi_latent_attention.yarn"),
    ],
)
def test_what_cannot_be_computed_is_refused_with_the_reason(
    tree: dict[str, Any], latent: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as error:
        model(tree, latent, **changes)
    assert words in str(error.value)


def test_the_hidden_size_needs_no_room_for_whole_heads(tree: dict[str, Any]) -> None:
    found = model(tree, {}, num_attention_heads=6)
    assert (found.head_dim, found.value_dim, found.kv_heads) == (16, 12, 6)


def test_parameters_are_those_of_the_latents(tree: dict[str, Any]) -> None:
    """d = 64, 4 heads; of a layer: to the latent and the shared key 24 + 6, from it 4 (10 + 12), out 4 x 12."""
    common = (24 + 6) * 64 + 24 + 4 * (10 + 12) * 24 + 64 * 4 * 12
    from_token, from_latent = model(tree, {}), model(tree, {"q_lora_rank": 20})
    assert parameter_count(from_token).attention == 4 * (common + 4 * 16 * 64)
    assert parameter_count(from_latent).attention == 4 * (common + 20 * 64 + 20 + 4 * 16 * 20)
    for found in (from_token, from_latent):
        assert parameter_count(found).total == sum(math.prod(shape) for _, shape in parameter_shapes(found))


def test_flops_are_six_per_active_matrix_weight_plus_scores_and_values(tree: dict[str, Any]) -> None:
    found = model(tree, {"q_lora_rank": 20})
    count = parameter_count(found)
    norms = (2 * found.num_layers + 1) * 64 + found.num_layers * (20 + 24)
    lookup = found.vocab_size * 64
    attention = 3 * found.num_layers * found.seq_length * 4 * (16 + 12)
    assert flops_per_token(found) == 6 * (count.active_per_token - norms - lookup) + attention


def test_familiar_names_lead_to_the_section() -> None:
    assert nearest_setting("model.kv_lora_rank") == "model.multi_latent_attention.kv_lora_rank"
    assert nearest_setting("model.qk_nope_head_dim") == "model.multi_latent_attention.qk_head_dim"
