"""dots.llm1 (arXiv 2506.05767): DeepSeek-V3's experts (arXiv 2412.19437) with ordinary attention.

Sigmoid scores, groups of experts, a bias per expert that only the choice sees, shared experts beside the routed ones,
and dense layers first. Its shared experts are one MLP, which is one shared expert of ours.
"""

from __future__ import annotations

from typing import Any

from moetrain.config.schema import ModelConfig
from moetrain.convert.architectures.base import Architecture, Config, Field, refuse
from moetrain.convert.architectures.decoder import (
    COMMON,
    DENSE_MLP,
    EXPERTS,
    FUSED_EXPERTS,
    GATES,
    MLP,
    NO_ATTENTION_BIAS,
    QK_NORM,
    ROUTER,
    THEIR_MLP,
    TOP_K,
    decoder_fields,
    refuse_sliding_layers,
)
from moetrain.convert.mapping import Rule, same
from moetrain.errors import ConversionError

_SHARED: tuple[Rule, ...] = (
    Rule(
        MLP + "shared_expert.fc1",
        (THEIR_MLP + "shared_experts.gate_proj.weight", THEIR_MLP + "shared_experts.up_proj.weight"),
        "split_gate_up",
    ),
    same(MLP + "shared_expert.fc2", THEIR_MLP + "shared_experts.down_proj.weight"),
    # A rounded bias would choose other experts.
    same(MLP + "router.bias", THEIR_MLP + "gate.e_score_correction_bias", keep_fp32=True),
)


def _complete(config: Config, tree: dict[str, Any]) -> None:
    refuse_sliding_layers(config, tree)
    layers, first = tree["num_layers"], config.get("first_k_dense_replace", 0) or 0
    if type(first) is not int or not 0 <= first < layers:
        refuse("first_k_dense_replace", first, f"0 to num_hidden_layers - 1 ({layers - 1})")
    # `layer_types` says which layers have the window; where it is absent, `max_window_layers` does.
    if config.get("layer_types") is None and config.get("sliding_window", 4096) is not None:
        window_from = config.get("max_window_layers", 62)
        if not isinstance(window_from, int) or window_from < layers:
            refuse("max_window_layers", window_from, f"num_hidden_layers ({layers}) and more, or sliding_window null")
    shared = config.get("n_shared_experts")
    if type(shared) is not int or not 1 <= shared <= 1024:
        refuse("n_shared_experts", shared, "1 to 1024")
    tree["moe"]["shared_expert_ffn_hidden_size"] = shared * tree["moe"]["ffn_hidden_size"]
    tree["moe"]["layer_freq"] = [int(i >= first) for i in range(layers)]


def _express(model: ModelConfig, config: dict[str, Any]) -> None:
    assert model.moe is not None
    wide = model.moe.shared_expert_ffn_hidden_size or 0
    if wide == 0 or wide % model.moe.ffn_hidden_size:
        raise ConversionError(
            f"dots1 does not fit this model: model.moe.shared_expert_ffn_hidden_size ({wide}) must be a multiple of "
            f"model.moe.ffn_hidden_size ({model.moe.ffn_hidden_size})"
        )
    config["n_shared_experts"] = wide // model.moe.ffn_hidden_size
    config["first_k_dense_replace"] = next(i for i in range(model.num_layers) if model.is_moe_layer(i))
    groups = config["n_group"]
    config["topk_group"] = config["topk_group"] or groups
    config |= {"sliding_window": None, "layer_types": ["full_attention"] * model.num_layers}


DOTS1 = Architecture(
    name="dots1",
    class_names=("Dots1ForCausalLM",),
    spellings=tuple(
        (*COMMON, *QK_NORM, ROUTER, *_SHARED, *experts, *DENSE_MLP) for experts in (EXPERTS, FUSED_EXPERTS)
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
