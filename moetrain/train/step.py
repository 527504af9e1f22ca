"""One step of the mathematics: micro-batches through Megatron's schedule, then the optimizer, then the controllers.

Knows nothing of logging, checkpoints or the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from moetrain.config.schema import RunConfig
from moetrain.data.loader import MicroBatch
from moetrain.model.decoder import Decoder
from moetrain.moe.layer import MoELayer
from moetrain.moe.telemetry import RouterCounts, RouterTelemetry
from moetrain.optim.zero import ZeroOptimizer
from moetrain.optim.zero3 import ZeroStage3Optimizer
from moetrain.runtime.groups import ParallelGroups
from moetrain.train.objectives import objective_of


@dataclass(frozen=True)
class StepOutcome:
    """What a step computed, the same on every rank.

    Attributes:
        loss: mean over the labels that count of the global batch, before the update; nats per token, or per sequence,
            or squared error.
        grad_norm: global norm before clipping.
        skipped: the update was dropped because a gradient was not finite.
        router: counts of every MoE layer of the whole model, by its number (`ModelConfig.router_numbers`).
        controllers: the routers' scalar controllers of the whole model during this step, by name, by layer number.
    """

    loss: float
    grad_norm: float
    skipped: bool
    router: dict[int, RouterCounts]
    controllers: dict[int, dict[str, float]]


@dataclass(frozen=True)
class EvalOutcome:
    """What an evaluation of one global batch found, the same on every rank.

    Attributes:
        loss: mean over the labels that count.
        labels: how many there are.
        hits: how many of them the model got right; masked language models only, else None.
        outputs: a head's outputs for every sequence in the order of the samples, float64 [global batch, C]; else None.
    """

    loss: float
    labels: float
    hits: float | None
    outputs: Tensor | None


@dataclass(frozen=True)
class _Sums:
    """What one all-reduce over the world brings together."""

    loss: float
    hits: float
    outputs: Tensor
    router: dict[int, RouterCounts]
    controllers: dict[int, dict[str, float]]


class TrainStep:
    """Forward, backward and update of one global batch."""

    def __init__(
        self,
        config: RunConfig,
        chunks: Sequence[Decoder],
        groups: ParallelGroups,
        optimizer: ZeroOptimizer | ZeroStage3Optimizer | None,
    ) -> None:
        """Without an optimizer only `evaluate` works."""
        self.config, self.chunks, self.groups, self.optimizer = config, list(chunks), groups, optimizer
        self.device = next(chunks[0].parameters()).device
        length = config.model.seq_length
        self._positions = torch.arange(length, device=self.device)[None]
        self._schedule = get_forward_backward_func()
        self._moe_layers = {m.number: m for chunk in chunks for m in chunk.modules() if isinstance(m, MoELayer)}
        self._all_moe_layers = config.model.router_numbers
        moe = config.model.moe
        self._codec = RouterTelemetry(moe.num_choices, moe.max_top_k, moe.router.num_statistics) if moe else None
        self._has_hyper = moe is not None and moe.hyper is not None
        self._reported = moe.router.reported if moe else ()
        self._objective = objective_of(config.training.objective, groups.tensor)

    def run(
        self, microbatches: Sequence[MicroBatch], lr: float, before_update: Callable[[], None] = lambda: None
    ) -> StepOutcome:
        """Train on this data-parallel rank's share of a global batch. Collective over the world.

        `before_update` is called between the backward pass and the optimizer's step.
        """
        assert self.optimizer is not None
        for chunk in self.chunks:
            chunk.train()
        results = self._forward_backward(microbatches, self._count_labels(microbatches), forward_only=False)
        before_update()
        result = self.optimizer.step(lr)
        sums = self._reduce(results, len(microbatches), scored=False)
        if not result.skipped:
            for layer, moe_layer in self._moe_layers.items():
                moe_layer.update(sums.router[layer])
        return StepOutcome(sums.loss, result.grad_norm, result.skipped, sums.router, sums.controllers)

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[MicroBatch]) -> EvalOutcome:
        """Losses and scores of a global batch; nothing is updated. Collective over the world."""
        for chunk in self.chunks:
            chunk.eval()
        labels = self._count_labels(microbatches)
        results = self._forward_backward(microbatches, labels, forward_only=True)
        sums = self._reduce(results, len(microbatches), scored=True)
        counts_hits = self.config.training.objective.type == "masked_lm"
        outputs = sums.outputs if self._objective.outputs else None
        return EvalOutcome(sums.loss, labels, sums.hits if counts_hits else None, outputs)

    def _count_labels(self, microbatches: Sequence[MicroBatch]) -> float:
        """How many labels of the global batch count in its loss.

        Communication: one all-reduce of a number over the data-parallel ranks, where batches have weights.
        """
        if microbatches[0].weights is None:
            return float(len(microbatches) * microbatches[0].labels.numel() * self.groups.layout.data)
        count = torch.tensor([sum(float(_weights(batch).sum()) for batch in microbatches)], dtype=torch.float64)
        count = count.to(self.device)
        dist.all_reduce(count, group=self.groups.data)
        return count.item()

    def _forward_backward(
        self, microbatches: Sequence[MicroBatch], labels: float, forward_only: bool
    ) -> list[dict[str, Tensor]]:
        iterators = [iter(microbatches) for _ in self.chunks]
        single = len(self.chunks) == 1
        # Megatron divides by the micro-batches of this rank and ZeRO by the data-parallel ranks.
        scale = len(microbatches) * self.groups.layout.data / max(labels, 1.0)
        return self._schedule(
            forward_step_func=partial(self._forward, scale=scale, scored=forward_only),
            data_iterator=iterators[0] if single else iterators,
            model=self.chunks[0] if single else self.chunks,  # pyright: ignore[reportArgumentType]
            num_microbatches=len(microbatches),
            seq_length=self.config.model.seq_length,
            micro_batch_size=self.config.training.micro_batch_size,
            forward_only=forward_only,
        )

    def _forward(self, data: Iterator[MicroBatch], model: Decoder, scale: float, scored: bool) -> tuple[Tensor, Any]:
        batch = _on_device(next(data), self.device)
        positions = self._positions.expand(batch.tokens.shape[0], -1)
        output = self._objective.forward(model, batch, positions, scored)
        if self.optimizer is not None:
            self.optimizer.watch_microbatch(output)
        return output, partial(self._loss, model=model, batch=batch, scale=scale, scored=scored)

    def _loss(
        self, output: Tensor, model: Decoder, batch: MicroBatch, scale: float, scored: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Megatron's loss function. It divides what is returned first in place by the number of micro-batches, so what
        is kept for the log must be a copy."""
        losses, hits, outputs = self._objective.losses(model, output, batch, scored)
        loss = _combine(losses.float(), batch.weights, scale)
        kept = {"loss": loss.detach().clone()}
        if hits is not None:
            kept["hits"] = (hits * _weights(batch)).sum()
        if outputs is not None:
            kept["outputs"] = outputs
        return loss, kept

    def _reduce(self, results: list[dict[str, Tensor]], num_microbatches: int, scored: bool) -> _Sums:
        """The mean loss, every layer's counts, every controller's state, and what was evaluated, through one all-reduce
        over the world."""
        at, layout = self.groups.coordinates, self.groups.layout
        shown = [(layer, name) for layer in self._all_moe_layers for name in self._reported]
        head = torch.zeros(2 + len(shown), dtype=torch.float64, device=self.device)
        if at.tensor == 0:
            for slot, name in enumerate(("loss", "hits")):
                head[slot] = sum((r[name].double() for r in results if name in r), start=head[slot])
        if at.tensor == 0 and at.data == 0:
            for slot, (layer, name) in enumerate(shown, start=2):
                if layer in self._moe_layers:
                    head[slot] = self._moe_layers[layer].router.get_buffer(name)
        width = self._objective.outputs if scored else 0
        outputs = self._place_outputs(results, num_microbatches, width)
        packed = torch.cat([head, outputs.flatten(), *map(self._take_telemetry, self._all_moe_layers)])
        dist.all_reduce(packed, group=self.groups.world)
        head, flat, counts = packed.split([len(head), outputs.numel(), len(packed) - len(head) - outputs.numel()])
        router: dict[int, RouterCounts] = {}
        if self._codec is not None:
            router = {
                layer: self._codec.decode(row, layout.tensor, self._has_hyper)
                for layer, row in zip(self._all_moe_layers, counts.split(self._codec.size), strict=True)
            }
            mean_k = fmean(layer.mean_k for layer in router.values())
            router = {layer: replace(counted, model_mean_k=mean_k) for layer, counted in router.items()}
        controllers: dict[int, dict[str, float]] = {layer: {} for layer in self._all_moe_layers}
        for (layer, name), value in zip(shown, head[2:].tolist(), strict=True):
            controllers[layer][name] = value
        loss, hits = head[0].item() / (num_microbatches * layout.data), head[1].item()
        return _Sums(loss, hits, flat.view(-1, max(width, 1)), router, controllers)

    def _place_outputs(self, results: list[dict[str, Tensor]], num_microbatches: int, width: int) -> Tensor:
        """The head's `width` outputs that this rank contributes, at their places among the samples of the global batch
        (see `rank_indices`): [micro-batches, data ranks, micro-batch size, width]."""
        at, layout, size = self.groups.coordinates, self.groups.layout, self.config.training.micro_batch_size
        placed = torch.zeros(num_microbatches, layout.data, size, width, dtype=torch.float64, device=self.device)
        if at.tensor == 0 and width > 0:
            for number, result in enumerate(results):
                placed[number, at.data] = result["outputs"].double()
        return placed

    def _take_telemetry(self, layer: int) -> Tensor:
        """The layer's accumulated vector, or zeros where another pipeline stage holds the layer."""
        assert self._codec is not None
        here = self._moe_layers.get(layer)
        return (here.telemetry if here is not None else self._codec).take(self.device)


def _combine(losses: Tensor, weights: Tensor | None, scale: float) -> Tensor:
    """This micro-batch's part of the loss. With weights not its mean: another may have more labels, and every label of
    the global batch counts the same."""
    return losses.mean() if weights is None else (losses * weights).sum() * scale


def _weights(batch: MicroBatch) -> Tensor:
    assert batch.weights is not None, "all micro-batches of an objective have weights, or none has"
    return batch.weights


def _on_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    parts = {part.name: getattr(batch, part.name) for part in fields(batch)}
    return replace(batch, **{k: t.to(device, non_blocking=True) for k, t in parts.items() if t is not None})
