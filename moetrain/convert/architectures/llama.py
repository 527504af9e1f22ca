"""Llama: dense."""

from __future__ import annotations

from typing import Any

from moetrain.convert.architectures.base import Architecture, Config, Field, Fixed, refuse
from moetrain.convert.architectures.decoder import COMMON, DENSE_MLP, NO_ATTENTION_BIAS, decoder_fields


def _complete(_: Config, tree: dict[str, Any]) -> None:
    if tree["hidden_size"] % tree["num_attention_heads"]:  # transformers refuses it, whatever head_dim says
        refuse("hidden_size", tree["hidden_size"], "a multiple of num_attention_heads")


LLAMA = Architecture(
    name="llama",
    class_names=("LlamaForCausalLM",),
    spellings=((*COMMON, *DENSE_MLP),),
    fields=(
        *decoder_fields(epsilon=1e-6, kv_heads=None),
        Field(("intermediate_size",), "ffn_hidden_size"),
        NO_ATTENTION_BIAS,
        Fixed("mlp_bias", (False,), default=False),
    ),
    rope_theta=10_000.0,
    implies={},
    complete=_complete,
)
