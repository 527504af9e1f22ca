"""Our own architecture: the modelling files of `hf_modeling`, which an export carries with it."""

from __future__ import annotations

from moetrain.convert.mapping import Rule, same

_ATTENTION, _THEIR_ATTENTION = "decoder.layers.{i}.self_attention.", "model.layers.{i}.self_attn."
_MLP, _THEIR_MLP = "decoder.layers.{i}.mlp.", "model.layers.{i}.mlp."
_HYPERNETWORK = (
    "layer_embedding",
    *(f"{part}.{kind}" for part in ("input", "down", "down_bias", "up", "up_bias") for kind in ("weight", "bias")),
)
_SELECTION = (
    "expert_embedding",
    *(f"{part}.{kind}" for part in ("process_in", "process_out") for kind in ("weight", "bias")),
    "constant",
)


def _all(names: tuple[str, ...], ours: str, theirs: str) -> tuple[Rule, ...]:
    """Tensors that only have another prefix."""
    return tuple(same(ours + name, theirs + name) for name in names)


RULES: tuple[Rule, ...] = (
    same("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    same("decoder.layers.{i}.input_layernorm.weight", "model.layers.{i}.input_layernorm.weight"),
    Rule(
        _ATTENTION + "linear_qkv.weight",
        tuple(_THEIR_ATTENTION + f"{x}_proj.weight" for x in "qkv"),
        "split_qkv",
    ),
    Rule(
        _ATTENTION + "linear_qkv.bias",
        tuple(_THEIR_ATTENTION + f"{x}_proj.bias" for x in "qkv"),
        "split_qkv",
    ),
    same(_ATTENTION + "q_layernorm.weight", _THEIR_ATTENTION + "q_norm.weight"),
    same(_ATTENTION + "k_layernorm.weight", _THEIR_ATTENTION + "k_norm.weight"),
    same(_ATTENTION + "linear_proj.weight", _THEIR_ATTENTION + "o_proj.weight"),
    same("decoder.layers.{i}.pre_mlp_layernorm.weight", "model.layers.{i}.post_attention_layernorm.weight"),
    Rule(
        _MLP + "linear_fc1.weight",
        (_THEIR_MLP + "gate_proj.weight", _THEIR_MLP + "up_proj.weight"),
        "split_gate_up",
    ),
    same(_MLP + "linear_fc2.weight", _THEIR_MLP + "down_proj.weight"),
    same(_MLP + "router.weight", _THEIR_MLP + "gate.weight"),
    same(_MLP + "router.predictor", _THEIR_MLP + "gate.predictor"),
    # Rounding thresholds to bf16 would change the number of experts of many tokens, so they never leave fp32.
    same(_MLP + "router.thresholds", _THEIR_MLP + "gate.thresholds", keep_fp32=True),
    Rule(
        _MLP + "experts.fc1",
        (_THEIR_MLP + "experts.{e}.gate_proj.weight", _THEIR_MLP + "experts.{e}.up_proj.weight"),
        "split_gate_up",
    ),
    same(_MLP + "experts.fc2", _THEIR_MLP + "experts.{e}.down_proj.weight"),
    *_all(_SELECTION, _MLP + "hyper.", _THEIR_MLP + "hyper.selection."),
    *_all(_HYPERNETWORK, _MLP + "hyper.network.", _THEIR_MLP + "hyper.network."),
    *_all(("down.weight", "down.bias", "up.weight", "up.bias"), _MLP + "hyper.", _THEIR_MLP + "hyper."),
    *_all(_HYPERNETWORK, "hypernetwork.", "model.hypernetwork."),
    *_all(_HYPERNETWORK, "hypernetworks.{s}.", "model.hypernetworks.{s}."),
    *_all(_SELECTION, "selection_embedding.", "model.selection_embedding."),
    same("decoder.final_layernorm.weight", "model.norm.weight"),
    same("output_layer.weight", "lm_head.weight"),
)
