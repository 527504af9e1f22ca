"""Qwen2: dense, with biases on queries, keys and values."""

from __future__ import annotations

from moetrain.convert.architectures.base import Architecture, Field
from moetrain.convert.architectures.decoder import (
    COMMON,
    DENSE_MLP,
    NO_SLIDING_WINDOW,
    QKV_BIAS,
    decoder_fields,
    refuse_sliding_layers,
)

QWEN2 = Architecture(
    name="qwen2",
    class_names=("Qwen2ForCausalLM",),
    spellings=((*COMMON, QKV_BIAS, *DENSE_MLP),),
    fields=(
        *decoder_fields(epsilon=1e-6),
        Field(("intermediate_size",), "ffn_hidden_size"),
        NO_SLIDING_WINDOW,
    ),
    rope_theta=10_000.0,
    implies={"add_qkv_bias": True},
    complete=refuse_sliding_layers,
)
