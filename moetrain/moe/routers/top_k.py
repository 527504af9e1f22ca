"""The same number of experts for every token (Switch, arXiv 2101.03961; GShard, arXiv 2006.16668).

With `scores: sigmoid` and groups, the choice of DeepSeek-V3 (arXiv 2412.19437 eq. 12-16). Legend: T tokens, E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moetrain.config.routers import ExpertBiasRouterConfig, TopKRouterConfig
from moetrain.moe.routing import Router, RoutingContext, RoutingDecision, take_best
from moetrain.moe.scores import only_best_groups, scores_of, shares

if TYPE_CHECKING:
    from moetrain.config.moe import MoEConfig


class TopKRouter(Router):
    """The best `top_k` experts of each token by softmax or sigmoid scores, perhaps of its best groups only.

    The balance loss sees the scores as shares of their sum, as DeepSeek-V3's does (eq. 19); for a softmax they are it.
    """

    def __init__(self, moe: MoEConfig, hidden_size: int, dtype: torch.dtype, layer: int) -> None:
        super().__init__(moe, hidden_size, dtype, layer)
        assert isinstance(moe.router, TopKRouterConfig | ExpertBiasRouterConfig)
        self.settings = moe.router

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        settings = self.settings
        logits_TE = self.logits(x_TD, context)
        scores_TE = scores_of(logits_TE, settings.scores)
        order_TE = only_best_groups(
            self.preference(scores_TE), settings.groups, settings.top_groups or settings.groups, settings.group_score
        )
        num_selected_T = torch.full((x_TD.shape[0],), self.max_k, dtype=torch.int64, device=x_TD.device)
        ids_TK, weights_TK = take_best(order_TE, scores_TE, num_selected_T, self.max_k)
        if settings.gates == "renormalized":
            weights_TK = shares(weights_TK)
        if settings.scaling_factor != 1.0:
            weights_TK = weights_TK * settings.scaling_factor
        probs_TE = scores_TE if settings.scores == "softmax" else shares(scores_TE)
        return RoutingDecision(ids_TK, weights_TK, probs_TE, logits_TE, num_selected_T)

    def preference(self, scores_TE: Tensor) -> Tensor:
        """What experts are chosen by."""
        return scores_TE.detach()
