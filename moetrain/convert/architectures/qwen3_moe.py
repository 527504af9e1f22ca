"""Qwen3-MoE: dense layers among those with experts, norms of the heads of queries and keys."""

from __future__ import annotations

from typing import Any

from moetrain.config.model import ModelConfig
from moetrain.convert.architectures.base import Architecture, Config, Field, refuse
from moetrain.convert.architectures.decoder import (
    AUX_LOSS,
    COMMON,
    DENSE_MLP,
    EXPERTS,
    FUSED_EXPERTS,
    GATES,
    NO_ATTENTION_BIAS,
    NO_SLIDING_WINDOW,
    QK_NORM,
    ROUTER,
    SOFTMAX_TOP_K,
    TOP_K,
    decoder_fields,
)


def _complete(config: Config, tree: dict[str, Any]) -> None:
    """A layer has experts if it is no `mlp_only_layers`, and the last one of each `decoder_sparse_step`."""
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    layers = tree["num_layers"]
    if type(step) is not int or not 1 <= step <= layers:
        refuse("decoder_sparse_step", step, f"1 to num_hidden_layers ({layers})")
    if not isinstance(dense, list) or any(type(i) is not int or not 0 <= i < layers for i in dense):
        refuse("mlp_only_layers", dense, f"a list of layers, 0 to {layers - 1}")
    tree["moe"]["layer_freq"] = [int(i not in dense and (i + 1) % step == 0) for i in range(layers)]


def _express(model: ModelConfig, config: dict[str, Any]) -> None:
    config["decoder_sparse_step"] = 1
    config["mlp_only_layers"] = [i for i in range(model.num_layers) if not model.is_moe_layer(i)]


QWEN3_MOE = Architecture(
    name="qwen3_moe",
    class_names=("Qwen3MoeForCausalLM",),
    spellings=tuple((*COMMON, *QK_NORM, ROUTER, *experts, *DENSE_MLP) for experts in (EXPERTS, FUSED_EXPERTS)),
    fields=(
        *decoder_fields(epsilon=1e-6),
        Field(("intermediate_size",), "ffn_hidden_size"),
        Field(("moe_intermediate_size",), "moe.ffn_hidden_size"),
        Field(("num_experts", "num_local_experts"), "moe.num_experts"),
        TOP_K,
        GATES,
        AUX_LOSS,
        NO_ATTENTION_BIAS,
        NO_SLIDING_WINDOW,
    ),
    rope_theta=10_000.0,
    implies=SOFTMAX_TOP_K | {"qk_layernorm": "head"},
    complete=_complete,
    express=_express,
)
