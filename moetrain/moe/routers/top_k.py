"""The same number of experts for every token (Switch, arXiv 2101.03961; GShard, arXiv 2006.16668)."""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.config.routers import TopKRouterConfig
from moetrain.config.schema import MoEConfig
from moetrain.moe.routing import Router, RoutingContext, RoutingDecision, take_best


class TopKRouter(Router):
    """Softmax over all experts, the best `top_k` of each token."""

    def __init__(self, moe: MoEConfig, hidden_size: int, dtype: torch.dtype, layer: int) -> None:
        super().__init__(moe, hidden_size, dtype, layer)
        assert isinstance(moe.router, TopKRouterConfig)
        self.renormalize = moe.router.gates == "renormalized"

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        logits_TE = self.logits(x_TD, context)
        probs_TE = logits_TE.softmax(dim=-1)
        num_selected_T = torch.full((x_TD.shape[0],), self.max_k, dtype=torch.int64, device=x_TD.device)
        ids_TK, weights_TK = take_best(probs_TE, probs_TE, num_selected_T, self.max_k)
        if self.renormalize:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return RoutingDecision(ids_TK, weights_TK, probs_TE, logits_TE, num_selected_T)
