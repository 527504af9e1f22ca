"""What a router is given, what it decides, and what it must promise. The routers stand in `routers/`, one to a file.

Legend: S sequence positions of this rank, B sequences of the micro-batch, T = S * B tokens of this rank in the order
of [S, B], D hidden size, E experts (global), K the most experts that a token can get.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moetrain.moe.controllers import Controlled
from moetrain.moe.telemetry import RouterCounts
from moetrain.ops import row_invariant_linear

if TYPE_CHECKING:  # a plug-in's settings may stand beside its module, and the schema loads them while it is made
    from moetrain.config.moe import MoEConfig


@dataclass(frozen=True)
class RoutingContext:
    """What a router may know of the tokens besides their hidden states.

    Attributes:
        local_length, sequences: S and B.
        length: positions of a whole sequence, over all the tensor ranks that share it.
        start: position in the sequence of this rank's first token.
        importance_T: fp32, the statistic that the router's settings asked for as `attention_measure`, or in training
            the rank that they asked for as `attention_teacher`; else None.
        valid_T: bool, True = a real token; None: all are. What a router decides for padding is taken back (see
            `RoutingDecision.without_padding`), but its statistics and its loss must leave padding out.
        real_lengths_B: real tokens of each whole sequence, int64; None: all of `length`.
        hidden_TE: bool, experts that a token may not see (`moe.token_mask`); None: it may see all.
    """

    local_length: int
    sequences: int
    length: int
    start: int
    importance_T: Tensor | None
    valid_T: Tensor | None = None
    real_lengths_B: Tensor | None = None
    hidden_TE: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """S and B, as which T unfolds."""
        return self.local_length, self.sequences

    def positions(self, device: torch.device) -> Tensor:
        """Position of each token in its sequence, int64 [T]."""
        here_S = torch.arange(self.start, self.start + self.local_length, device=device)
        return here_S.repeat_interleave(self.sequences)

    def lengths(self, device: torch.device) -> Tensor:
        """Real tokens of each whole sequence, at least 1, fp32 [B]."""
        if self.real_lengths_B is None:
            return torch.full((self.sequences,), float(self.length), device=device)
        return self.real_lengths_B.to(torch.float32).clamp(min=1.0)

    def mean_parts(self, values_TX: Tensor) -> Tensor:
        """This rank's part of the mean over each sequence's real tokens, [B, X]: over the tensor ranks that share the
        sequences the parts sum to it."""
        if self.valid_T is not None:
            values_TX = values_TX.masked_fill(~self.valid_T[:, None], 0.0)
        return values_TX.unflatten(0, self.shape).sum(dim=0) / self.lengths(values_TX.device)[:, None]

    def mean_part(self, values_T: Tensor) -> Tensor:
        """This rank's part of the mean over the micro-batch: of a value's means over its sequences' real tokens."""
        return self.mean_parts(values_T[:, None]).mean()


@dataclass(frozen=True)
class LoadPenalty:
    """The loss `coefficient` * E * sum_e load_e * mean value_e, where load_e is the part of the tokens that went to
    expert e. The layer evaluates it, because whose tokens count is its business (`moe.aux_loss`).

    Attributes:
        coefficient: scalar, without gradient.
        values_TE: fp32, differentiable.
    """

    coefficient: Tensor
    values_TE: Tensor


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
        load_penalty: a loss of the router's own that weighs experts by their load, or None.
    """

    expert_ids_TK: Tensor
    weights_TK: Tensor
    probs_TE: Tensor
    logits_TE: Tensor
    num_selected_T: Tensor
    statistics: Tensor | None = None
    loss: Tensor | None = None
    load_penalty: LoadPenalty | None = None

    def without_padding(self, valid_T: Tensor) -> RoutingDecision:
        """The same for real tokens; padding (False) gets no expert, no weight and no probability. Its logits stay, and
        the z-loss must leave them out."""
        real_T1, penalty = valid_T[:, None], self.load_penalty
        return replace(
            self,
            expert_ids_TK=torch.where(real_T1, self.expert_ids_TK, -1),
            weights_TK=self.weights_TK.masked_fill(~real_T1, 0.0),
            probs_TE=self.probs_TE.masked_fill(~real_T1, 0.0),
            num_selected_T=torch.where(valid_T, self.num_selected_T, 0),
            load_penalty=None
            if penalty is None
            else replace(penalty, values_TE=penalty.values_TE.masked_fill(~real_T1, 0.0)),
        )


class Router(Controlled, ABC):
    """A linear gate, and the choice of experts that a subclass makes of its scores.

    What every router promises (`moetrain.testing.check_router` holds it to that): 1 to K experts for every token, none
    twice; no token is a legal batch; a gradient reaches the gate; what a token gets depends on the token and on what
    the context says of it alone, so that neither its neighbors nor its future changes a bit of it; controllers stand
    still except in `update`.
    """

    def __init__(self, moe: MoEConfig, hidden_size: int, dtype: torch.dtype, layer: int) -> None:
        """`layer` is the 0-based global number, `hidden_size` that of what the gate sees. Parameters are filled by
        `moetrain.model.parameters.initialize`."""
        super().__init__()
        self.num_experts, self.max_k, self.layer = moe.num_choices, moe.max_top_k, layer
        self.weight = nn.Parameter(torch.empty(moe.num_choices, hidden_size, dtype=dtype))

    @abstractmethod
    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        """Choose experts for this rank's tokens."""

    def update(self, counts: RouterCounts) -> None:
        """Move the controllers, once per optimizer step, by the counts of the whole global batch."""

    def logits(self, x_TD: Tensor, context: RoutingContext | None = None) -> Tensor:
        """The gate's scores [T, E] in fp32 whatever the model's dtype, because near-ties decide which expert runs;
        minus infinity for the experts that the context hides from a token.

        Not by `@`: a BLAS picks its blocking by the number of rows, and then a token's last bits depend on how many
        others stand in the batch (with OpenBLAS or MKL at D = 512, up to some 15 rows: just where decoding is).
        """
        logits_TE = row_invariant_linear(x_TD.float(), self.weight.float())
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
