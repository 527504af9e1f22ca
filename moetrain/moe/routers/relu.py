"""ReMoE: every expert with a positive score, and a penalty that keeps them few (arXiv 2412.14711).

Legend: T tokens, E experts.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moetrain.config.routers import ReLURouterConfig
from moetrain.moe.routing import LoadPenalty, Router, RoutingContext, RoutingDecision, take_best
from moetrain.moe.telemetry import RouterCounts

if TYPE_CHECKING:
    from moetrain.config.moe import MoEConfig

_LARGEST_COEFF = 1e3  # so that a target out of reach cannot wind the coefficient up to infinity


class ReLURouter(Router):
    """Weights are relu(logits), not normalized; the experts with a positive one are selected, at most `max_k`.

    Loss: lambda E / mean_k * sum_e load_e * mean relu_e, the L1 norm with each expert weighed by its load (section
    3.3). The logarithm of lambda is the controller `log_l1_coeff`. With K the mean of the global batch over all layers,
    as in the source (so lambda is the same in all), or over this layer (`mean_over`), it moves, after each step, by
    ln(l1_coeff_step) times

        sign:           sign(K - mean_k), the source's rule (section 3.2)
        proportional:   ln(K / mean_k), at most 1 either way

    because the sign alone swings: it goes on raising lambda while K falls, and the budget is met on average only. On a
    gate that learns with AdamW the mean K of single batches spreads by 0.6 to 0.9 around 2 with it, and by 0.1 in
    proportion. lambda stays between `l1_coeff_init`, where the penalty is nothing, and a ceiling: the source has no
    bounds, and there a long wait for sparsity winds lambda down to where it needs as long to return.

    A token without a positive score goes to the expert of its best one, with weight 0 and, straight through, the
    gradient of a weight: it learns whether that expert would help. In the source it gets no expert, and no gradient
    until others have moved the gate.

    The balance loss sees softmax(logits). Shares relu / sum relu would have gradients without bound where the sum is
    nearly 0.
    """

    log_l1_coeff: Tensor

    def __init__(self, moe: MoEConfig, hidden_size: int, dtype: torch.dtype, layer: int) -> None:
        super().__init__(moe, hidden_size, dtype, layer)
        assert isinstance(moe.router, ReLURouterConfig)
        self.settings = moe.router
        self.least = math.log(self.settings.l1_coeff_init)
        self.add_controller("log_l1_coeff", torch.tensor(self.least, dtype=torch.float32))

    def forward(self, x_TD: Tensor, context: RoutingContext) -> RoutingDecision:
        logits_TE = self.logits(x_TD, context)
        relu_TE = logits_TE.relu()
        positive_T = (relu_TE > 0).sum(dim=-1)
        num_selected_T = positive_T.clamp(1, self.max_k)
        straight_through_TE = logits_TE - logits_TE.detach()
        values_TE = torch.where(positive_T[:, None] > 0, relu_TE, straight_through_TE)
        ids_TK, weights_TK = take_best(logits_TE, values_TE, num_selected_T, self.max_k)
        coefficient = self.log_l1_coeff.exp() / self.settings.mean_k
        return RoutingDecision(
            ids_TK,
            weights_TK,
            logits_TE.softmax(dim=-1),
            logits_TE,
            num_selected_T,
            load_penalty=LoadPenalty(coefficient, relu_TE),
        )

    def update(self, counts: RouterCounts) -> None:
        if not any(counts.k_histogram):
            return
        mean_k = counts.model_mean_k if self.settings.mean_over == "model" else None
        error = math.log((counts.mean_k if mean_k is None else mean_k) / self.settings.mean_k)
        if self.settings.controller == "sign":
            error = math.copysign(1.0, error)
        step = math.log(self.settings.l1_coeff_step) * max(-1.0, min(1.0, error))
        self.log_l1_coeff.add_(step).clamp_(self.least, math.log(_LARGEST_COEFF))
