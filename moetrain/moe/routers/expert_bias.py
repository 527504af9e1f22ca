"""Balance without a loss: a bias per expert in the choice alone (arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437).

Legend: T tokens, E experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moetrain.config.routers import ExpertBiasRouterConfig
from moetrain.moe.routers.top_k import TopKRouter
from moetrain.moe.telemetry import RouterCounts

if TYPE_CHECKING:
    from moetrain.config.moe import MoEConfig


class ExpertBiasRouter(TopKRouter):
    """Experts, and groups, are chosen by score + bias; weights are scores (DeepSeek-V3 eq. 16).

    After each step the bias of an expert with less than the mean load of the global batch rises by `bias_rate`, and
    that of one with more falls (arXiv 2408.15664 algorithm 1). Counts are integers, so every layout moves alike.
    """

    bias: Tensor

    def __init__(self, moe: MoEConfig, hidden_size: int, dtype: torch.dtype, layer: int) -> None:
        super().__init__(moe, hidden_size, dtype, layer)
        assert isinstance(self.settings, ExpertBiasRouterConfig)
        self.rate = self.settings.bias_rate
        self.add_controller("bias", torch.zeros(self.num_experts, dtype=torch.float32))

    def preference(self, scores_TE: Tensor) -> Tensor:
        return scores_TE.detach() + self.bias

    def update(self, counts: RouterCounts) -> None:
        loads = torch.tensor(counts.tokens_per_expert, dtype=torch.float64)
        lacking = torch.sign(loads.sum() - loads * len(loads)).to(self.bias)
        self.bias.add_(lacking, alpha=self.rate)
