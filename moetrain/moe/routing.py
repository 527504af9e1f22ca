"""What a router is given, what it decides, and what it must promise. The routers stand in `routers/`, one to a file.

Legend: S sequence positions of this rank, B sequences of the micro-batch, T = S * B tokens of this rank in the order
of [S, B], D hidden size, E experts (global), K the most experts that a token can get.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor, nn

from moetrain.config.schema import MoEConfig
from moetrain.moe.telemetry import RouterCounts


@dataclass(frozen=True)
class RoutingContext:
    """What a router may know of the tokens besides their hidden states.

    Attributes:
        local_length, sequences: S and B.
        length: positions of a whole sequence, over all the tensor ranks that share it.
        start: position in the sequence of this rank's first token.
        importance_T: fp32, the statistic that the router's settings asked for as `attention_measure`; else None.
        hidden_TE: bool, experts that a token may not see (`moe.token_mask`); None: it may see all.
    """

    local_length: int
    sequences: int
    length: int
    start: int
    importance_T: Tensor | None
    hidden_TE: Tensor | None = None

    def positions(self, device: torch.device) -> Tensor:
        """Position of each token in its sequence, int64 [T]."""
        here_S = torch.arange(self.start, self.start + self.local_length, device=device)
        return here_S.repeat_interleave(self.sequences)

    def mean_part(self, values_T: Tensor) -> Tensor:
        """This rank's part of the mean over the micro-batch's tokens: the parts sum to it over the tensor ranks."""
        return values_T.sum() / (self.sequences * self.length)


@dataclass(frozen=True)
class RoutingDecision:
    """For each token, 1..K experts and their weights.

    Attributes:
        expert_ids_TK: int64; best expert first, -1 for an unused slot.
        weights_TK: fp32, differentiable; 0 in an unused slot.
        probs_TE: fp32, differentiable, rows that sum to one; what the balance loss sees.
        logits_TE: fp32, differentiable; what the z-loss sees.
        num_selected_T: int64, K of each token.
        statistics: fp64 [num_statistics of the settings], sums over this rank's tokens of whatever the router's
            controllers live by, or None. They come back summed over the global batch in `Router.update`; let them be
            integers, so that the sum does not depend on the layout.
        loss: scalar, differentiable, with its coefficient: a loss of the router's own, or None. It is this rank's
            part, as `RoutingContext.mean_part` gives it.
    """

    expert_ids_TK: Tensor
    weights_TK: Tensor
    probs_TE: Tensor
    logits_TE: Tensor
    num_selected_T: Tensor
    statistics: Tensor | None = None
    loss: Tensor | None = None


class Router(nn.Module, ABC):
    """A linear gate, and the choice of experts that a subclass makes of its scores.

    What every router promises (`moetrain.testing.check_router` holds it to that): 1 to K experts for every token, none
    twice; no token is a legal batch; a gradient reaches the gate; what a token gets depends on the token and on what
    the context says of it alone, so that neither its neighbours nor its future changes a bit of it; controllers stand
    still except in `update`.
    """

    def __init__(self, moe: MoEConfig, hidden_size: int, dtype: torch.dtype, layer: int) -> None:
        """`layer` is the 0-based global number, `hidden_size` that of what the gate sees. Parameters are filled by
        `moetrain.model.parameters.initialize`."""
        super().__init__()
        self.num_experts, self.max_k, self.layer = moe.num_choices, moe.max_top_k, layer
        self.weight = nn.Parameter(torch.empty(moe.num_choices, hidden_size, dtype=dtype))
        self._controllers: list[str] = []

    @abstractmethod
    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Choose experts for this rank's tokens."""

    def update(self, counts: RouterCounts) -> None:
        """Move the controllers, once per optimizer step, by the counts of the whole global batch."""

    def add_controller(self, name: str, value: Tensor) -> None:
        """State that belongs to the training but not to the optimizer: fp32, the same on all ranks, checkpointed."""
        assert value.dtype == torch.float32
        self.register_buffer(name, value, persistent=False)
        self._controllers.append(name)

    def controllers(self) -> Iterator[tuple[str, Tensor]]:
        """Name and live tensor of every controller."""
        for name in self._controllers:
            yield name, self.get_buffer(name)

    def logits(self, x_TD: Tensor, context: RoutingContext | None = None) -> Tensor:
        """The gate's scores [T, E] in fp32 whatever the model's dtype, because near-ties decide which expert runs;
        minus infinity for the experts that the context hides from a token."""
        logits_TE = x_TD.float() @ self.weight.float().t()
        if context is None or context.hidden_TE is None:
            return logits_TE
        return logits_TE.masked_fill(context.hidden_TE, -torch.inf)


def take_best(order_TE: Tensor, values_TE: Tensor, num_selected_T: Tensor, max_k: int) -> tuple[Tensor, Tensor]:
    """The `num_selected_T` experts of each token with the highest `order_TE`: their ids (-1 in unused slots) and their
    `values_TE` (0 there), both [T, K]."""
    ids_TK = order_TE.topk(max_k, dim=-1).indices
    used_TK = torch.arange(max_k, device=order_TE.device) < num_selected_T[:, None]
    return torch.where(used_TK, ids_TK, -1), torch.where(used_TK, values_TE.gather(1, ids_TK), 0.0)


def build_router(moe: MoEConfig, hidden_size: int, dtype: torch.dtype, layer: int) -> Router:
    """The router that the settings name."""
    module, _, name = moe.router.implementation.partition(":")
    return getattr(import_module(module), name)(moe, hidden_size, dtype, layer)
