"""Thresholds that hold a budget: every expert whose affinity exceeds its own (https://spaces.ac.cn/archives/10815).

Legend: T tokens, E experts.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moetrain.config.routers import BiasThresholdRouterConfig
from moetrain.moe.routing import Router, RoutingContext, RoutingDecision, take_best
from moetrain.moe.scores import shares, sigmoid
from moetrain.moe.telemetry import RouterCounts

if TYPE_CHECKING:
    from moetrain.config.moe import MoEConfig

_TYPICAL_STD = 0.02  # of a gate's initial weights


class BiasThresholdRouter(Router):
    """Expert e is selected where rho_e + b_e > 0, rho = sigmoid(logits); weights are rho. At least the best one by
    rho + b is selected, at most `max_k`.

    With c_e of the global batch's T tokens on expert e, F = c / sum c, after each step

        joint:     b_e -= rate * (s_e - mean(s) + sign(sum c - T mean_k)),  s_e = sign(F_e - 1/E)
        separate:  b_e -= rate * sign(c_e - T mean_k / E)

    c counts what was selected, the least and the most included, so the budget is that of the work done. The biases
    start where scores of a gate with initial weights of 0.02, for tokens of unit mean square, would give the target
    (the source bisects on random scores instead).
    """

    bias: Tensor

    def __init__(self, moe: MoEConfig, hidden_size: int, dtype: torch.dtype, layer: int) -> None:
        super().__init__(moe, hidden_size, dtype, layer)
        assert isinstance(moe.router, BiasThresholdRouterConfig)
        self.settings = moe.router
        quantile = NormalDist(sigma=_TYPICAL_STD * hidden_size**0.5).inv_cdf(
            1 - self.settings.mean_k / self.num_experts
        )
        self.add_controller("bias", -torch.tensor(quantile, dtype=torch.float32).sigmoid().repeat(self.num_experts))

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        logits_TE = self.logits(x_TD, context)
        rho_TE = sigmoid(logits_TE)
        margin_TE = rho_TE.detach() + self.bias
        num_selected_T = (margin_TE > 0).sum(dim=-1).clamp(1, self.max_k)
        ids_TK, weights_TK = take_best(margin_TE, rho_TE, num_selected_T, self.max_k)
        return RoutingDecision(ids_TK, weights_TK, shares(rho_TE), logits_TE, num_selected_T)

    def update(self, counts: RouterCounts) -> None:
        loads = torch.tensor(counts.tokens_per_expert, dtype=torch.float64)
        budget = sum(counts.k_histogram) * self.settings.mean_k
        if self.settings.rule == "separate":
            move = torch.sign(loads * len(loads) - budget)
        else:
            above = torch.sign(loads * len(loads) - loads.sum())
            move = above - above.mean() + torch.sign(loads.sum() - budget)
        self.bias.sub_(move.to(self.bias), alpha=self.settings.bias_rate)
