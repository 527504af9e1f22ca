"""Choices of the gate that compute next to nothing: zero, copy and constant experts (MoE++, arXiv 2410.07348, Eq. 3-5;
AdaMoE, arXiv 2406.13233, has zero experts only). They run on the token's home rank and never travel.

Legend: T tokens, D hidden size, K slots per token, N all choices of the gate, Z computation-free ones, J constant ones.
Choices are numbered: experts, zero, copy, constant.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from moetrain.config.relatives import ComputationFreeConfig
from moetrain.moe.routing import RoutingDecision
from moetrain.ops import row_invariant_linear


class ComputationFreeExperts(nn.Module):
    """zero(x) = 0, copy(x) = x, constant(x) = a1 x + a2 v with [a1, a2] = softmax(W x), W [2, D] and v [D] trained."""

    def __init__(self, config: ComputationFreeConfig, num_experts: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.num_experts = config, num_experts
        constants = config.constant_experts
        if constants > 0:
            self.mix = nn.Parameter(torch.empty(constants, 2, hidden_size, dtype=dtype))
            self.vector = nn.Parameter(torch.empty(constants, hidden_size, dtype=dtype))

    def weigh(self, decision: RoutingDecision) -> RoutingDecision:
        """The decision with the settings' gates, and with `probs_TE` as the balance loss shall see them.

        The loss is linear in the probabilities, so a choice's weight in it is a factor on its probability, and the
        mean over pooled loads is the mean over pooled probabilities.
        """
        probs_TN = decision.probs_TE
        experts_TE, free_TZ = probs_TN[:, : self.num_experts], probs_TN[:, self.num_experts :]
        if self.config.pooled_balance:
            free_TZ = free_TZ.mean(dim=-1, keepdim=True).expand_as(free_TZ)
        probs_TN = torch.cat([experts_TE, free_TZ * self.config.balance_weight], dim=-1)
        return replace(decision, probs_TE=probs_TN, weights_TK=self._gates(decision))

    def _gates(self, decision: RoutingDecision) -> Tensor:
        if self.config.gates == "as_routed":
            return decision.weights_TK
        free_TK = decision.expert_ids_TK - self.num_experts
        is_zero_TK = (free_TK >= 0) & (free_TK < self.config.zero_experts)
        weights_TK = decision.weights_TK.masked_fill(is_zero_TK, 0.0)
        total_T1 = weights_TK.sum(dim=-1, keepdim=True)
        # A token that chose nothing but zero experts gets nothing.
        return weights_TK / total_T1.masked_fill(total_T1 == 0.0, 1.0)

    def travelers(self, choices_TK: Tensor) -> Tensor:
        """The choices that are experts; -1 for the others."""
        return torch.where(choices_TK < self.num_experts, choices_TK, -1)

    def forward(self, x_TD: Tensor, choices_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The weighted sum of each token's computation-free choices, [T, D] in fp32."""
        x_TD = x_TD.float()
        weights_TZ = self._by_choice(choices_TK, weights_TK)
        _, copies_TC, constants_TJ = weights_TZ.split(
            [self.config.zero_experts, self.config.copy_experts, self.config.constant_experts], dim=-1
        )
        of_token_T1 = copies_TC.sum(dim=-1, keepdim=True)
        if self.config.constant_experts == 0:
            return of_token_T1 * x_TD
        scores_TX = row_invariant_linear(x_TD, self.mix.float().flatten(0, 1))
        shares_TJ2 = scores_TX.unflatten(-1, (-1, 2)).softmax(dim=-1)
        of_token_T1 = of_token_T1 + (constants_TJ * shares_TJ2[..., 0]).sum(dim=-1, keepdim=True)
        of_vectors_TJ = constants_TJ * shares_TJ2[..., 1]
        return of_token_T1 * x_TD + row_invariant_linear(of_vectors_TJ, self.vector.float().t().contiguous())

    def _by_choice(self, choices_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Weight of each computation-free choice, [T, Z]; 0 where it was not chosen."""
        total = self.config.total
        free_TK = choices_TK - self.num_experts
        # What is no choice of ours writes into an extra column that is cut off.
        place_TK = torch.where(free_TK >= 0, free_TK, total)
        empty_TZ = weights_TK.new_zeros(choices_TK.shape[0], total + 1)
        return empty_TZ.scatter(1, place_TK, weights_TK)[:, :total]
