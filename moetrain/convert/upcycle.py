"""Upcycling: a checkpoint of one model becomes a checkpoint of a larger one that computes the same function.

A dense layer's MLP is copied into every expert (arXiv 2212.05055), and gates that sum to 1 make the copies add up to
the MLP. A branch that the source lacks (hyper-expert, shared expert) starts at exactly zero, with gradients: its last
weights are zero, all weights before them are not. Everything else that is new gets the value that a new run would give
it. Streams: memory holds one block of weights at a time, an expert or another tensor, and up to 256 MB of them.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moetrain.checkpoint.files import OS_FILES
from moetrain.checkpoint.reader import CheckpointReader
from moetrain.checkpoint.store import Piece
from moetrain.config.loader import config_from_dict
from moetrain.config.schema import RunConfig
from moetrain.config.size import parameter_shapes
from moetrain.convert.step_folder import write_step_folder
from moetrain.convert.upcycle_rules import Transition, plan_transition
from moetrain.convert.whole_folder import appearing_whole, refuse_full_disk, refuse_nonempty
from moetrain.errors import ConversionError
from moetrain.model.parameters import initial_controllers, initial_weight, seeded_generator
from moetrain.model.reference_logits import megatron_logits

TOLERANCE = 1e-4
"""Largest difference of a logit, in fp32, that counts as equal. Weights that sum to 1 up to rounding move logits by
about 1e-6; one misplaced tensor moves them by far more."""

Source = Literal["taken", "copied", "zero", "drawn"]
Shape = tuple[int, ...]

_DENSE_MLP = {"experts.fc1": "linear_fc1.weight", "experts.fc2": "linear_fc2.weight"}
_LAST_OF_A_BRANCH = re.compile(
    r"(^hypernetworks?(\.\d+)?|\.hyper(\.network)?)\.up(_bias)?\.(weight|bias)$|\.shared_expert\.fc2$"
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NewWeight:
    """A weight of the target and where it comes from; `stored`: the source's tensor that is taken or copied."""

    name: str
    shape: Shape
    source: Source
    stored: str | None


@dataclass(frozen=True)
class Difference:
    """Largest difference of a logit between source and target, over so many positions."""

    max_abs: float
    positions: int


@dataclass(frozen=True)
class UpcycleReport:
    """What was written. `sources` counts the tensors by where they came from; `changes` says why logits differ, if they
    do; `difference` is None without verification."""

    folder: Path
    parameters: int
    sources: Counter[Source]
    changes: tuple[str, ...]
    difference: Difference | None


def upcycle(
    source: CheckpointReader,
    target: RunConfig,
    out: Path,
    noise: float = 0.0,
    allow_change: bool = False,
    verify: bool = True,
    announce: Callable[[str], None] = log.info,
) -> UpcycleReport:
    """Write `out`, a step folder of weights and controllers, where `checkpoint.load` with `load_weights_only` starts.

    Args:
        noise: standard deviation of a normal number that is added to every weight of every copied expert.
        allow_change: accept a router that changes the logits.
        verify: compare the logits of both models in this process, in fp32, on random tokens; each must fit in memory.
            There must be no process group yet.

    `out` appears whole or not at all. New values are functions of `target.training.seed` and names, as in a new run.

    Raises:
        ConversionError: the models do not fit together, `out` is not empty, its disk is too small, or the logits differ
            by more than `TOLERANCE` where nothing asked them to; or a file cannot be read or written.
        CheckpointError: the source lacks a tensor.
    """
    refuse_nonempty(out)
    if not 0.0 <= noise < math.inf:
        raise ConversionError(f"--noise is {noise:g}; must be a standard deviation: 0 or more, and finite")
    run = config_from_dict(source.config, f"the config in {source.folder}")
    transition = plan_transition(run, target, allow_change)
    if noise and not transition.new_moe_layers:
        raise ConversionError(f"--noise ({noise:g}) is for copies of an MLP, and no layer becomes MoE here; remove it")
    weights = _plan(source, run, target, transition)
    changes = (*transition.changes, *([f"noise of {noise:g} on every copied weight"] if noise else []))
    parameters = sum(math.prod(weight.shape) for weight in weights)
    refuse_full_disk(out, 4 * parameters)
    announce(f"upcycling {source.folder} to {out}: {parameters:,} parameters, {4 * parameters / 1e9:.3f} GB")
    try:
        with appearing_whole(out) as folder:
            pieces = _pieces(source, target, weights, transition, noise)
            write_step_folder(folder, pieces, target, "upcycled", _extra(source))
            difference = _compare(source, folder, must_agree=not changes) if verify else None
        OS_FILES.sync_folder(out.absolute().parent)
    except OSError as error:
        raise ConversionError(f"upcycling to {out} failed: {error}") from error
    return UpcycleReport(out, parameters, Counter(weight.source for weight in weights), changes, difference)


# --- what comes from where ------------------------------------------------------------------------------------------


def _plan(source: CheckpointReader, run: RunConfig, target: RunConfig, transition: Transition) -> list[NewWeight]:
    stored = dict(parameter_shapes(run.model))
    _require_stored(source, stored)
    weights = [_origin(name, shape, stored) for name, shape in parameter_shapes(target.model)]
    used = {weight.stored for weight in weights}
    left = {name for name in stored if name not in used}
    if transition.router_changes:
        left = {name for name in left if ".router." not in name}
    assert not left, f"the target has no place for {sorted(left)}"
    for weight in weights:
        shape = weight.shape[1:] if weight.source == "copied" else weight.shape
        if weight.stored is not None and stored[weight.stored] != shape:
            raise ConversionError(
                f"{weight.name} has shape {list(weight.shape)} in the target; the source's {weight.stored} has "
                f"{list(stored[weight.stored])}"
            )
    return weights


def _require_stored(source: CheckpointReader, expected: dict[str, Shape]) -> None:
    for name, shape in expected.items():
        if source.shape(f"weight.{name}") != shape:
            raise ConversionError(
                f"{source.folder}: weight.{name} has shape {list(source.shape(f'weight.{name}'))}; the config stored "
                f"with it says {list(shape)}"
            )


def _origin(name: str, shape: Shape, stored: dict[str, Shape]) -> NewWeight:
    if name in stored:
        return NewWeight(name, shape, "taken", name)
    prefix, _, part = name.partition(".mlp.")
    if part in _DENSE_MLP:
        return NewWeight(name, shape, "copied", f"{prefix}.mlp.{_DENSE_MLP[part]}")
    return NewWeight(name, shape, "zero" if _LAST_OF_A_BRANCH.search(name) else "drawn", None)


# --- the tensors ----------------------------------------------------------------------------------------------------


def _pieces(
    source: CheckpointReader, target: RunConfig, weights: list[NewWeight], transition: Transition, noise: float
) -> Iterator[Piece]:
    for weight in weights:
        if ".experts." in weight.name and len(weight.shape) == 3:
            for expert in range(weight.shape[0]):
                tensor = _expert(source, target, weight, expert, noise)[None]
                yield Piece(f"weight.{weight.name}", weight.shape, (expert, 0, 0), tensor)
        else:
            yield Piece.whole(f"weight.{weight.name}", _whole(source, target, weight))
    stored = set(source.names()) if not transition.router_changes else set()
    for name, initial in initial_controllers(target.model):
        key = f"controller.{name}"
        yield Piece.whole(key, source.read(key) if key in stored else initial)


def _expert(source: CheckpointReader, target: RunConfig, weight: NewWeight, expert: int, noise: float) -> Tensor:
    """One expert's matrix."""
    key = f"weight.{weight.stored}"
    if weight.source == "taken":
        return source.read(key, (expert, 0, 0), (1, *weight.shape[1:]))[0]
    matrix = source.read(key)
    if noise:
        generator = seeded_generator(target.training.seed, f"noise/{weight.name}[{expert}]")
        matrix += noise * torch.randn(matrix.shape, generator=generator)
    return matrix


def _whole(source: CheckpointReader, target: RunConfig, weight: NewWeight) -> Tensor:
    if weight.source == "taken":
        return source.read(f"weight.{weight.stored}")
    if weight.source == "zero":
        return torch.zeros(weight.shape)
    return initial_weight(weight.name, weight.shape, target.model, target.training.seed)


def _extra(source: CheckpointReader) -> dict[str, Any]:
    extra: dict[str, Any] = {"upcycled_from": {"folder": str(source.folder), "step": source.step}}
    if "tokenizer" in source.extra:  # its tokens are those of the embedding, whoever trains on
        extra["tokenizer"] = source.extra["tokenizer"]
    return extra


# --- the proof ------------------------------------------------------------------------------------------------------


def _compare(source: CheckpointReader, folder: Path, must_agree: bool, sequences: int = 2) -> Difference:
    """Logits of both models for random tokens. ConversionError where they must agree and do not."""
    with CheckpointReader(folder) as target:
        models = [config_from_dict(reader.config, str(reader.folder)).model for reader in (source, target)]
        length = min(128, *(model.seq_length for model in models))
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(models[0].vocab_size, (sequences, length), generator=generator)
        before, after = (megatron_logits(reader, tokens) for reader in (source, target))
    if not (before.isfinite().all() and after.isfinite().all()):
        raise ConversionError("logits are not all finite, so that source and target cannot be compared")
    difference = Difference((before.double() - after.double()).abs().max().item(), tokens.numel())
    if must_agree and difference.max_abs > TOLERANCE:
        raise ConversionError(
            f"the target's logits differ from the source's by up to {difference.max_abs:.3g} over {tokens.numel()} "
            f"positions, tolerance {TOLERANCE:g}; nothing was written"
        )
    return difference
