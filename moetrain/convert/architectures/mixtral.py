"""Mixtral (arXiv 2401.04088): experts in every layer, gates renormalized."""

from __future__ import annotations

from typing import Any

from moetrain.config.model import ModelConfig
from moetrain.convert.architectures.base import Architecture, Config, Field, Fixed, refuse
from moetrain.convert.architectures.decoder import (
    AUX_LOSS,
    COMMON,
    FUSED_EXPERTS,
    MLP,
    ROUTER,
    SOFTMAX_TOP_K,
    TOP_K,
    all_layers,
    decoder_fields,
)
from moetrain.convert.mapping import Rule, same

_BLOCK = "model.layers.{i}.block_sparse_moe."
_WRITTEN: tuple[Rule, ...] = (
    *COMMON,
    same(MLP + "router.weight", _BLOCK + "gate.weight"),
    Rule(
        MLP + "experts.fc1",
        (_BLOCK + "experts.{e}.w1.weight", _BLOCK + "experts.{e}.w3.weight"),
        "split_gate_up",
    ),
    same(MLP + "experts.fc2", _BLOCK + "experts.{e}.w2.weight"),
)


def _complete(config: Config, tree: dict[str, Any]) -> None:
    all_layers(config, tree)
    window = config.get("sliding_window")
    if window is not None and not (isinstance(window, int) and window >= tree["seq_length"]):
        refuse("sliding_window", window, "null, or max_position_embeddings and more")


def _express(_: ModelConfig, config: dict[str, Any]) -> None:
    config["sliding_window"] = None


MIXTRAL = Architecture(
    name="mixtral",
    class_names=("MixtralForCausalLM",),
    spellings=(_WRITTEN, (*COMMON, ROUTER, *FUSED_EXPERTS)),
    fields=(
        *decoder_fields(epsilon=1e-5),
        Field(("intermediate_size",), "moe.ffn_hidden_size"),
        Field(("num_local_experts", "num_experts"), "moe.num_experts"),
        TOP_K,
        AUX_LOSS,
        Fixed("router_jitter_noise", (0.0,), default=0.0),
    ),
    rope_theta=1_000_000.0,
    implies=SOFTMAX_TOP_K | {"moe.router.gates": "renormalized"},
    complete=_complete,
    express=_express,
)
