"""dots.llm1 (arXiv 2506.05767): DeepSeek-V3's experts (arXiv 2412.19437) with ordinary attention.

Sigmoid scores, groups of experts, a bias per expert that only the choice sees, shared experts beside the routed ones,
and dense layers first.
"""

from __future__ import annotations

from typing import Any

from moetrain.config.model import ModelConfig
from moetrain.convert.architectures.base import Architecture, Config, Field, refuse
from moetrain.convert.architectures.decoder import (
    COMMON,
    DENSE_MLP,
    EXPERTS,
    FUSED_EXPERTS,
    GATES,
    NO_ATTENTION_BIAS,
    QK_NORM,
    ROUTER,
    TOP_K,
    decoder_fields,
    refuse_sliding_layers,
)
from moetrain.convert.architectures.deepseek_experts import ROUTER_BIAS, SHARED_EXPERT, read_layers, write_layers


def _complete(config: Config, tree: dict[str, Any]) -> None:
    refuse_sliding_layers(config, tree)
    layers = tree["num_layers"]
    # `layer_types` says which layers have the window; where it is absent, `max_window_layers` does.
    if config.get("layer_types") is None and config.get("sliding_window", 4096) is not None:
        window_from = config.get("max_window_layers", 62)
        if not isinstance(window_from, int) or window_from < layers:
            refuse("max_window_layers", window_from, f"num_hidden_layers ({layers}) and more, or sliding_window null")
    read_layers(config, tree)


def _express(model: ModelConfig, config: dict[str, Any]) -> None:
    write_layers(model, config)
    groups = config["n_group"]
    config["topk_group"] = config["topk_group"] or groups
    config |= {"sliding_window": None, "layer_types": ["full_attention"] * model.num_layers}


DOTS1 = Architecture(
    name="dots1",
    class_names=("Dots1ForCausalLM",),
    spellings=tuple(
        (*COMMON, *QK_NORM, ROUTER, ROUTER_BIAS, *SHARED_EXPERT, *experts, *DENSE_MLP)
        for experts in (EXPERTS, FUSED_EXPERTS)
    ),
    fields=(
        *decoder_fields(epsilon=1e-6),
        Field(("intermediate_size",), "ffn_hidden_size"),
        Field(("moe_intermediate_size",), "moe.ffn_hidden_size"),
        Field(("n_routed_experts", "num_local_experts"), "moe.num_experts"),
        TOP_K,
        GATES,
        Field(("routed_scaling_factor",), "moe.router.scaling_factor", default=1.0, kind=float),
        Field(("n_group",), "moe.router.groups", default=1),
        Field(("topk_group",), "moe.router.top_groups", default=1),
        NO_ATTENTION_BIAS,
    ),
    rope_theta=10_000.0,
    implies={"qk_layernorm": "head", "moe.router.type": "expert_bias", "moe.router.scores": "sigmoid"},
    complete=_complete,
    express=_express,
)
