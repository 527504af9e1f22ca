"""DA-MoE: importance decides how many experts a token gets (arXiv 2409.06669).

Legend: T tokens, E experts, K the most experts that a token can get.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moetrain.config.routers import DAMoERouterConfig
from moetrain.config.schema import MoEConfig
from moetrain.moe.routing import Router, RoutingContext, RoutingDecision, take_best
from moetrain.moe.telemetry import RouterCounts


class DAMoERouter(Router):
    """Softmax over all experts; K of a token grows with its importance.

    budget: paper. K = ceil(I * E), clamped. The mean K is whatever attention's sharpness makes it.

    budget: mean_k. K = ceil(alpha * I), clamped, where alpha holds the layer's mean K at a target. The controller
    `log_alpha` moves once per optimizer step by the relative error of the mean K over the whole global batch (integer
    counts, so every layout computes the same number) and stands still in evaluation. It starts where an importance of
    one half would give the target.
    """

    log_alpha: Tensor

    def __init__(self, moe: MoEConfig, hidden_size: int, dtype: torch.dtype, layer: int) -> None:
        super().__init__(moe, hidden_size, dtype, layer)
        settings = moe.router
        assert isinstance(settings, DAMoERouterConfig)
        self.settings = settings
        if settings.budget == "mean_k":
            self.add_controller("log_alpha", torch.tensor(math.log(2.0 * settings.mean_k), dtype=torch.float32))

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        assert context.importance_T is not None
        logits_TE = self.logits(x_TD, context)
        probs_TE = logits_TE.softmax(dim=-1)
        num_selected_T = self.count(context.importance_T)
        ids_TK, weights_TK = take_best(probs_TE, probs_TE, num_selected_T, self.max_k)
        if self.settings.gates == "renormalized":
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return RoutingDecision(ids_TK, weights_TK, probs_TE, logits_TE, num_selected_T)

    def count(self, importance_T: Tensor) -> Tensor:
        """K of each token, int64 [T], of its importance in [0, 1]."""
        scale = self.log_alpha.exp() if self.settings.budget == "mean_k" else self.num_experts
        return torch.ceil(importance_T * scale).to(torch.int64).clamp_(self.settings.min_k, self.max_k)

    def update(self, counts: RouterCounts) -> None:
        if self.settings.budget == "mean_k":
            target = self.settings.mean_k
            self.log_alpha.add_(self.settings.controller_rate * (target - counts.mean_k) / target)
