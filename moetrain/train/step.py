"""One step of the mathematics: micro-batches through Megatron's schedule, then the optimizer, then the controllers.

Knows nothing of logging, checkpoints or the loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from moetrain.config.schema import RunConfig
from moetrain.model.decoder import Decoder
from moetrain.moe.layer import MoELayer
from moetrain.moe.telemetry import RouterCounts, RouterTelemetry
from moetrain.optim.zero import ZeroOptimizer
from moetrain.optim.zero3 import ZeroStage3Optimizer
from moetrain.runtime.groups import ParallelGroups

if TYPE_CHECKING:
    from moetrain.data.loader import MicroBatch


@dataclass(frozen=True)
class StepOutcome:
    """What a step computed, the same on every rank.

    Attributes:
        loss: mean negative log-likelihood per token of the global batch, in nats, before the update.
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
class _Sums:
    """What one all-reduce over the world brings together."""

    loss: float
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

    def run(self, microbatches: Sequence[MicroBatch], lr: float) -> StepOutcome:
        """Train on this data-parallel rank's share of a global batch. Collective over the world."""
        assert self.optimizer is not None
        for chunk in self.chunks:
            chunk.train()
        losses = self._forward_backward(microbatches, forward_only=False)
        result = self.optimizer.step(lr)
        sums = self._reduce(losses, len(microbatches))
        if not result.skipped:
            for layer, moe_layer in self._moe_layers.items():
                moe_layer.router.update(sums.router[layer])
        return StepOutcome(sums.loss, result.grad_norm, result.skipped, sums.router, sums.controllers)

    @torch.no_grad()
    def evaluate(self, microbatches: Sequence[MicroBatch]) -> float:
        """Mean loss of a global batch, in nats per token; nothing is updated. Collective over the world."""
        for chunk in self.chunks:
            chunk.eval()
        losses = self._forward_backward(microbatches, forward_only=True)
        return self._reduce(losses, len(microbatches)).loss

    def _forward_backward(self, microbatches: Sequence[MicroBatch], forward_only: bool) -> list[dict[str, Tensor]]:
        iterators = [iter(microbatches) for _ in self.chunks]
        single = len(self.chunks) == 1
        return self._schedule(
            forward_step_func=self._forward,
            data_iterator=iterators[0] if single else iterators,
            model=self.chunks[0] if single else self.chunks,  # pyright: ignore[reportArgumentType]
            num_microbatches=len(microbatches),
            seq_length=self.config.model.seq_length,
            micro_batch_size=self.config.training.micro_batch_size,
            forward_only=forward_only,
        )

    def _forward(self, data: Iterator[MicroBatch], model: Decoder) -> tuple[Tensor, Any]:
        batch = next(data)
        tokens = batch.tokens.to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True) if model.post_process else None
        output = model(tokens, self._positions.expand(tokens.shape[0], -1), None, labels=labels)
        if self.optimizer is not None:
            self.optimizer.watch_microbatch(output)
        return output, _mean_loss

    def _reduce(self, losses: list[dict[str, Tensor]], num_microbatches: int) -> _Sums:
        """The mean loss, every layer's counts and every controller's state, through one all-reduce over the world."""
        at, layout = self.groups.coordinates, self.groups.layout
        shown = [(layer, name) for layer in self._all_moe_layers for name in self._reported]
        head = torch.zeros(1 + len(shown), dtype=torch.float64, device=self.device)
        if at.tensor == 0:
            head[0] = sum((entry["loss"].double() for entry in losses), start=head[0])
        if at.tensor == 0 and at.data == 0:
            for slot, (layer, name) in enumerate(shown, start=1):
                if layer in self._moe_layers:
                    head[slot] = self._moe_layers[layer].router.get_buffer(name)
        packed = torch.cat([head, *(self._take_telemetry(layer) for layer in self._all_moe_layers)])
        dist.all_reduce(packed, group=self.groups.world)
        router: dict[int, RouterCounts] = {}
        if self._codec is not None:
            counts = packed[len(head) :].split(self._codec.size)
            router = {
                layer: self._codec.decode(row, layout.tensor, self._has_hyper)
                for layer, row in zip(self._all_moe_layers, counts, strict=True)
            }
        controllers: dict[int, dict[str, float]] = {layer: {} for layer in self._all_moe_layers}
        for (layer, name), value in zip(shown, packed[1 : len(head)].tolist(), strict=True):
            controllers[layer][name] = value
        return _Sums(packed[0].item() / (num_microbatches * layout.data), router, controllers)

    def _take_telemetry(self, layer: int) -> Tensor:
        """The layer's accumulated vector, or zeros where another pipeline stage holds the layer."""
        assert self._codec is not None
        here = self._moe_layers.get(layer)
        return (here.telemetry if here is not None else self._codec).take(self.device)


def _mean_loss(loss_BS: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Megatron's loss function: the mean over tokens. It divides what is returned first in place by the number of
    micro-batches, so what is kept for the log must be a copy."""
    loss = loss_BS.float().mean()
    return loss, {"loss": loss.detach().clone()}
