"""A run's whole state to and from a checkpoint, on any layout.

Weights are stored once, as ZeRO's fp32 masters; the model's own weights follow from them. Every rank writes the
fragments that ZeRO gave it, so nothing is gathered, and reads the fragments that its own layout asks for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker, get_cuda_rng_tracker

from moetrain.checkpoint.reader import CheckpointReader
from moetrain.checkpoint.state import ParameterShard, fill_from, pieces_of, read_rng, rng_piece
from moetrain.checkpoint.store import Piece
from moetrain.config.size import parameter_shapes
from moetrain.errors import CheckpointError
from moetrain.model.parameters import named_controllers
from moetrain.train.step import TrainStep

_WEIGHT, _EXP_AVG, _EXP_AVG_SQ, _CONTROLLER = "weight.", "optimizer.exp_avg.", "optimizer.exp_avg_sq.", "controller."
_HEAD = _WEIGHT + "head."


def collect_pieces(step: TrainStep) -> Iterator[Piece]:
    """This rank's share of the checkpoint: views of live memory. The optimizer's update changes the steady ones, and
    the next forward pass the others."""
    assert step.optimizer is not None
    for fragment in step.optimizer.fragments():
        if not step.optimizer.stores(fragment.info):
            continue
        shard = ParameterShard.of(fragment.info)
        yield from pieces_of(shard, _WEIGHT, fragment.master, fragment.start, steady=True)
        yield from pieces_of(shard, _EXP_AVG, fragment.exp_avg, fragment.start, steady=True)
        yield from pieces_of(shard, _EXP_AVG_SQ, fragment.exp_avg_sq, fragment.start, steady=True)
    at = step.groups.coordinates
    if at.tensor == 0 and at.data == 0:
        for name, controller in named_controllers(step.chunks):
            yield Piece.whole(_CONTROLLER + name, controller)
    yield rng_piece(dist.get_rank(), _rng_state())


def restore(step: TrainStep, reader: CheckpointReader, layout: dict[str, Any], log: logging.Logger) -> None:
    """Fill weights, moments, controllers and random states from a checkpoint of any layout. Collective.

    Raises:
        CheckpointError: a tensor is absent or of another shape, or the checkpoint holds weights alone.
    """
    assert step.optimizer is not None
    if "optimizer_steps" not in reader.extra:
        raise CheckpointError(
            f"{reader.folder}: holds weights and no optimizer state (`moetrain upcycle` wrote it), so that no run can "
            "resume from it; start a new one with checkpoint.load and checkpoint.load_weights_only=true"
        )
    steps = int(reader.extra["optimizer_steps"])
    for fragment in step.optimizer.fragments():
        shard = ParameterShard.of(fragment.info)
        fill_from(reader, shard, _WEIGHT, fragment.master, fragment.start)
        fill_from(reader, shard, _EXP_AVG, fragment.exp_avg, fragment.start)
        fill_from(reader, shard, _EXP_AVG_SQ, fragment.exp_avg_sq, fragment.start)
    step.optimizer.finish_load(steps)
    for name, controller in named_controllers(step.chunks):
        controller.copy_(reader.read(_CONTROLLER + name))
    if reader.layout == layout:
        state = read_rng(reader, dist.get_rank())
        if state is None:
            raise CheckpointError(
                f"{reader.folder}: no random state of rank {dist.get_rank()}, though the layout agrees"
            )
        _set_rng_state(state)
    else:
        log.info("random states were not restored: they belong to the ranks of another layout")


def restore_weights(step: TrainStep, reader: CheckpointReader, log: logging.Logger) -> None:
    """Fill weights and controllers alone; moments and random states stay those of a new run. Collective.

    A head that the checkpoint lacks keeps its initial values; that, and what of the checkpoint has no place in this
    model, goes into the log.

    Raises:
        CheckpointError: another tensor is absent, or one is of another shape.
    """
    assert step.optimizer is not None
    wanted = {_WEIGHT + name for name, _ in parameter_shapes(step.config.model)}
    stored = {name for name in reader.names() if name.startswith(_WEIGHT)}
    new, unused = sorted(wanted - stored), sorted(stored - wanted)
    if lost := [name for name in new if not name.startswith(_HEAD)]:
        raise CheckpointError(f"{reader.folder}: has no tensors {', '.join(lost)}, which this model needs")
    for fragment in step.optimizer.fragments():
        if _WEIGHT + fragment.info.name in stored:
            fill_from(reader, ParameterShard.of(fragment.info), _WEIGHT, fragment.master, fragment.start)
    step.optimizer.finish_load(0)
    for name, controller in named_controllers(step.chunks):
        controller.copy_(reader.read(_CONTROLLER + name))
    if new:
        log.info("not in the checkpoint, so at their initial values: %s", ", ".join(new))
    if unused:
        log.info("of the checkpoint, but without a place in this model: %s", ", ".join(unused))


def _tracker() -> CudaRNGStatesTracker:
    """Megatron's named random states; they exist once the groups do."""
    tracker = get_cuda_rng_tracker()
    assert tracker is not None
    return tracker


def _rng_state() -> torch.Tensor:
    """All random states of this rank, as the bytes of a safetensors file."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    states |= {f"tracker.{name}": state for name, state in _tracker().get_states().items()}
    return torch.frombuffer(bytearray(safetensors.torch.save(states)), dtype=torch.uint8)


def _set_rng_state(packed: torch.Tensor) -> None:
    states = safetensors.torch.load(packed.numpy().tobytes())
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    tracker = {name.removeprefix("tracker."): s for name, s in states.items() if name.startswith("tracker.")}
    _tracker().set_states(tracker)
