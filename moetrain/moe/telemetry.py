"""Counts and sums that a MoE layer keeps between two optimizer steps, on its device, as one flat vector.

One all-reduce of the vectors of all layers gives every rank the numbers of the whole global batch: exact integers for
the mean-K controllers, and the router statistics that people look at.

Legend: E experts, K the most experts that a token can get.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RouterCounts:
    """A layer's telemetry, read back to the host.

    Attributes:
        tokens_per_expert: assignments of each expert, then of each computation-free choice, as the router made them.
        k_histogram: tokens that got 0, 1, ... K experts.
        load_balance, z_loss: mean auxiliary losses of a micro-batch, before their coefficients.
        statistics: what the router counted besides (`RoutingDecision.statistics`).
        hyper_norm_ratio: |hyper-expert output| / |experts' output| as root mean squares; None without HyperMoE.
        dropped: assignments that found no place within an expert's capacity.
        model_mean_k: mean number of experts per token over all layers of the model; None: this layer is the only one.
    """

    tokens_per_expert: list[int]
    k_histogram: list[int]
    load_balance: float
    z_loss: float
    statistics: list[float]
    hyper_norm_ratio: float | None
    dropped: int = 0
    model_mean_k: float | None = None

    @property
    def mean_k(self) -> float:
        """Mean number of experts per token of this layer."""
        return sum(k * n for k, n in enumerate(self.k_histogram)) / max(sum(self.k_histogram), 1)


class RouterTelemetry:
    """Accumulates over the micro-batches of a step. float64, so that counts stay exact beyond 2^24 tokens."""

    _SCALARS = ("load_balance", "z_loss", "expert_square", "hyper_square", "sequences", "dropped")

    def __init__(self, num_experts: int, max_k: int, num_statistics: int) -> None:
        self.num_experts, self.max_k, self.num_statistics = num_experts, max_k, num_statistics
        self.size = num_experts + max_k + 1 + num_statistics + len(self._SCALARS)
        self.values: Tensor | None = None

    def add(
        self,
        tokens_per_expert_E: Tensor,
        num_selected_T: Tensor,
        statistics: Tensor | None,
        load_balance: Tensor,
        z_loss: Tensor,
        expert_output: Tensor,
        hyper_output: Tensor | None,
        sequences: float,
        dropped: Tensor | int = 0,
    ) -> None:
        """Add one micro-batch. Losses are this rank's parts, as means over its sequences."""
        if self.values is None:
            self.values = torch.zeros(self.size, dtype=torch.float64, device=expert_output.device)
        zero = self.values.new_zeros(())
        scalars = (
            load_balance.detach() * sequences,
            z_loss.detach() * sequences,
            expert_output.detach().float().square().sum(),
            zero if hyper_output is None else hyper_output.detach().float().square().sum(),
            zero + sequences,
            zero + dropped,
        )
        # bincount is not deterministic on CUDA with weights; without weights it is.
        histogram = torch.bincount(num_selected_T, minlength=self.max_k + 1)
        if statistics is None:
            statistics = self.values.new_zeros(0)
        assert statistics.shape == (self.num_statistics,)
        self.values += torch.cat(
            [
                tokens_per_expert_E.double(),
                histogram.double(),
                statistics.double(),
                torch.stack([s.double() for s in scalars]),
            ]
        )

    def take(self, device: torch.device) -> Tensor:
        """The accumulated vector, float64 [size]; the accumulator starts again at zero."""
        values, self.values = self.values, None
        return torch.zeros(self.size, dtype=torch.float64, device=device) if values is None else values

    def decode(self, values: Tensor, tensor_ranks: int, has_hyper: bool) -> RouterCounts:
        """Read a vector that was summed over all ranks of the layer's stage.

        Each sequence was counted once by every one of its `tensor_ranks`, whose loss parts add up to the loss.
        """
        numbers = values.tolist()
        e, k = self.num_experts, self.max_k + 1
        n = e + k + self.num_statistics
        balance, z_loss, expert_square, hyper_square, sequences, dropped = numbers[n:]
        per_sequence = tensor_ranks / max(sequences, 1.0)
        ratio = (hyper_square / expert_square) ** 0.5 if has_hyper and expert_square > 0 else None
        return RouterCounts(
            tokens_per_expert=[int(count) for count in numbers[:e]],
            k_histogram=[int(count) for count in numbers[e : e + k]],
            load_balance=balance * per_sequence,
            z_loss=z_loss * per_sequence,
            statistics=numbers[e + k : n],
            hyper_norm_ratio=ratio,
            dropped=int(dropped),
        )
