"""Our own architecture: the modelling files of `hf_modeling`, which an export carries with it."""

from __future__ import annotations

from moetrain.convert.architectures.decoder import (
    COMMON,
    DENSE_MLP,
    EXPERTS,
    MLP,
    QK_NORM,
    QKV_BIAS,
    ROUTER,
    THEIR_MLP,
)
from moetrain.convert.mapping import Rule, same

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
    *COMMON,
    QKV_BIAS,
    *QK_NORM,
    *DENSE_MLP,
    ROUTER,
    same(MLP + "router.predictor", THEIR_MLP + "gate.predictor"),
    # Rounding thresholds to bf16 would change the number of experts of many tokens, so they never leave fp32.
    same(MLP + "router.thresholds", THEIR_MLP + "gate.thresholds", keep_fp32=True),
    *EXPERTS,
    *_all(_SELECTION, MLP + "hyper.", THEIR_MLP + "hyper.selection."),
    *_all(_HYPERNETWORK, MLP + "hyper.network.", THEIR_MLP + "hyper.network."),
    *_all(("down.weight", "down.bias", "up.weight", "up.bias"), MLP + "hyper.", THEIR_MLP + "hyper."),
    *_all(_HYPERNETWORK, "hypernetwork.", "model.hypernetwork."),
    *_all(_HYPERNETWORK, "hypernetworks.{s}.", "model.hypernetworks.{s}."),
    *_all(_SELECTION, "selection_embedding.", "model.selection_embedding."),
)
