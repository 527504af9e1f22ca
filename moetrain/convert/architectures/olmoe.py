"""OLMoE (arXiv 2409.02060): experts in every layer, norms of whole query and key projections."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moetrain.convert.architectures.base import Architecture, Config, Field, Fixed, refuse
from moetrain.convert.architectures.decoder import (
    AUX_LOSS,
    COMMON,
    EXPERTS,
    FUSED_EXPERTS,
    GATES,
    NO_ATTENTION_BIAS,
    QK_NORM,
    ROUTER,
    SOFTMAX_TOP_K,
    TOP_K,
    all_layers,
    decoder_fields,
)


def _complete(config: Config, tree: dict[str, Any]) -> None:
    all_layers(config, tree)
    if tree["kv_channels"] is not None and tree["kv_channels"] * tree["num_attention_heads"] != tree["hidden_size"]:
        refuse("head_dim", tree["kv_channels"], "hidden_size / num_attention_heads")


OLMOE = Architecture(
    name="olmoe",
    class_names=("OlmoeForCausalLM",),
    spellings=tuple((*COMMON, *QK_NORM, ROUTER, *experts) for experts in (EXPERTS, FUSED_EXPERTS)),
    fields=(
        *decoder_fields(epsilon=1e-5, kv_heads=None),
        Field(("intermediate_size",), "moe.ffn_hidden_size"),
        Field(("num_experts", "num_local_experts"), "moe.num_experts"),
        TOP_K,
        GATES,
        replace(AUX_LOSS, default=0.01),
        NO_ATTENTION_BIAS,
        Fixed("clip_qkv", (None,), default=None),
    ),
    rope_theta=10_000.0,
    implies=SOFTMAX_TOP_K | {"qk_layernorm": "projection"},
    complete=_complete,
)
