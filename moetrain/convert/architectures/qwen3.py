"""Qwen3: dense, with norms of the heads of queries and keys."""

from __future__ import annotations

from moetrain.convert.architectures.base import Architecture, Field
from moetrain.convert.architectures.decoder import (
    COMMON,
    DENSE_MLP,
    NO_ATTENTION_BIAS,
    NO_SLIDING_WINDOW,
    QK_NORM,
    decoder_fields,
    refuse_sliding_layers,
)

QWEN3 = Architecture(
    name="qwen3",
    class_names=("Qwen3ForCausalLM",),
    spellings=((*COMMON, *QK_NORM, *DENSE_MLP),),
    fields=(
        *decoder_fields(epsilon=1e-6, head_dim=128),
        Field(("intermediate_size",), "ffn_hidden_size"),
        NO_ATTENTION_BIAS,
        NO_SLIDING_WINDOW,
    ),
    rope_theta=10_000.0,
    implies={"qk_layernorm": "head"},
    complete=refuse_sliding_layers,
)
