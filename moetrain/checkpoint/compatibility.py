"""May a run continue from a checkpoint that another configuration wrote?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from moetrain.errors import CheckpointError

# Of the model section: how to compute, how to start, and coefficients of a loss, like a learning rate. No weight
# means something else when they change.
_MODEL_MAY_CHANGE = frozenset(
    {
        "model.recompute",
        "model.init_method_std",
        "model.moe.aux_loss_coeff",
        "model.moe.z_loss_coeff",
        "model.moe.hyper.form",
        "model.moe.hyper.recompute",
        "model.moe.dispatch",  # checkpoints from before these settings have none
        "model.moe.dispatch.max_rows",
        "model.moe.dispatch.overlap",
        "model.moe.capacity.pad",
        "model.moe.router.controller_rate",
        "model.moe.router.predictor_loss_coeff",
        "model.moe.router.bias_rate",
        "model.moe.router.entropy_loss_coeff",
        "model.moe.router.l1_coeff_step",
        "model.moe.router.controller",
        "model.moe.router.mean_over",
    }
)
# Where and on what a run runs; how often it speaks. Layout independence is the point of the format.
_SILENT = ("run.", "parallel.", "zero.", "checkpoint.", "runtime.", "training.")
_TRAINING_TO_TELL = frozenset({"training.seed", "training.global_batch_size", "training.precision"})
_OBJECTIVE = "training.objective."
_ABSENT = object()


def check_config(
    saved: dict[str, Any],
    current: dict[str, Any],
    saved_tokenizer: str | None = None,
    current_tokenizer: str | None = None,
    weights_only: bool = False,
) -> list[str]:
    """Compare the resolved configurations of a checkpoint and of the run that wants to load it.

    Returns notes on legal differences that change how training goes on (data, optimizer, batch size, seed, ...), one
    sentence each. CheckpointError lists every difference under `model` that makes the weights mean something else,
    and tokenizer fingerprints that differ (compared when both are given). With `weights_only` the run starts anew from
    the weights: then the head and the length of sequences may be others.
    """
    may_change = _MODEL_MAY_CHANGE | (_of_a_new_start(current) if weights_only else frozenset())
    contradictions: list[str] = []
    notes: list[str] = []
    for path, before, now in _differences(saved, current, ""):
        told = f"{path}: {_show(before)} in the checkpoint, {_show(now)} in this run"
        if path == "model" or (path.startswith("model.") and path not in may_change):
            contradictions.append(told)
        elif path in _TRAINING_TO_TELL or path.startswith(_OBJECTIVE) or not path.startswith(_SILENT):
            notes.append(told)
    if None not in (saved_tokenizer, current_tokenizer) and saved_tokenizer != current_tokenizer:
        contradictions.append(
            f"tokenizer fingerprint: {saved_tokenizer} in the checkpoint, {current_tokenizer} in this run"
        )
    if contradictions:
        raise CheckpointError(
            "the checkpoint belongs to another model; make these equal or start a new run: " + "; ".join(contradictions)
        )
    return notes


def model_differences(saved: dict[str, Any], current: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(dotted path, there, here, both as JSON) of every setting under `model` of two resolved configurations that
    differs and makes the weights mean something else."""
    for path, before, now in _differences(saved["model"], current["model"], "model"):
        if path not in _MODEL_MAY_CHANGE:
            yield path, _show(before), _show(now)


def _of_a_new_start(current: dict[str, Any]) -> frozenset[str]:
    """Settings of the model that may differ when only weights are taken."""
    head = {"model.head", "model.head.outputs", "model.head.pooling", "model.seq_length"}
    # A head stands where the output layer was, so it makes no difference whether that was tied.
    tied = {"model.share_embeddings_and_output_weights"} if current["model"].get("head") is not None else set()
    return frozenset(head | tied)


def _differences(saved: Any, current: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """(dotted path, saved, current) of every leaf that differs; a list is a leaf."""
    off = (None, False, _ABSENT)
    if any(saved is value for value in off) and any(current is value for value in off):
        return  # a part that is switched off, and a version that did not know it
    if not (isinstance(saved, dict) and isinstance(current, dict)):
        if saved != current or isinstance(saved, bool) != isinstance(current, bool):
            yield path, saved, current
        return
    for key in sorted(saved.keys() | current.keys()):
        below = f"{path}.{key}" if path else str(key)
        yield from _differences(saved.get(key, _ABSENT), current.get(key, _ABSENT), below)


def _show(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value)
