"""As many experts as it takes to be sure (arXiv 2403.07652, "Harder Tasks Need More Experts").

XMoE (arXiv 2403.18926) selects the experts before which the cumulated probability is below a threshold: the same set.
Legend: T tokens, E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moetrain.config.routers import TopPRouterConfig
from moetrain.moe.routing import Router, RoutingContext, RoutingDecision, take_best

if TYPE_CHECKING:
    from moetrain.config.moe import MoEConfig


class TopPRouter(Router):
    """K = min {k: sum of the k largest probabilities > threshold}, at most `max_k`; weights are the probabilities.

    The entropy of the probabilities is a loss of its own: without it they flatten, and K grows.
    """

    def __init__(self, moe: MoEConfig, hidden_size: int, dtype: torch.dtype, layer: int) -> None:
        super().__init__(moe, hidden_size, dtype, layer)
        assert isinstance(moe.router, TopPRouterConfig)
        self.settings = moe.router

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        logits_TE = self.logits(x_TD, context)
        probs_TE = logits_TE.softmax(dim=-1)
        with torch.no_grad():
            cumulated_TE = probs_TE.sort(dim=-1, descending=True).values.cumsum(dim=-1)
            enough_T = 1 + (cumulated_TE <= self.settings.threshold).sum(dim=-1)
            num_selected_T = enough_T.clamp(max=self.max_k)
        ids_TK, weights_TK = take_best(probs_TE, probs_TE, num_selected_T, self.max_k)
        entropy_T = logits_TE.logsumexp(dim=-1) - (probs_TE * logits_TE).sum(dim=-1)
        loss = self.settings.entropy_loss_coeff * context.mean_part(entropy_T)
        return RoutingDecision(ids_TK, weights_TK, probs_TE, logits_TE, num_selected_T, loss=loss)
