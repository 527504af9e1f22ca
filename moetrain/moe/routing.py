"""What a router decides, and the routers.

Legend: T tokens of this rank, D hidden size, E experts (global), K the most experts that a token can get.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from moetrain.config.schema import DAMoERouterConfig, MoEConfig, TopKRouterConfig


@dataclass(frozen=True)
class RoutingDecision:
    """For each token, 1..K experts and their weights.

    Attributes:
        expert_ids_TK: int64; best expert first, -1 for an unused slot.
        weights_TK: fp32, differentiable; 0 in an unused slot.
        probs_TE: fp32 softmax over all experts, differentiable; what the balance loss sees.
        logits_TE: fp32, differentiable; what the z-loss sees.
        num_selected_T: int64, K of each token.
    """

    expert_ids_TK: Tensor
    weights_TK: Tensor
    probs_TE: Tensor
    logits_TE: Tensor
    num_selected_T: Tensor

    def without_padding(self, valid_T: Tensor) -> RoutingDecision:
        """The same for real tokens; padding (False) gets no expert, no weight and no probability. Its logits stay, and
        the z-loss must leave them out."""
        real_T1 = valid_T[:, None]
        return replace(
            self,
            expert_ids_TK=torch.where(real_T1, self.expert_ids_TK, -1),
            weights_TK=self.weights_TK.masked_fill(~real_T1, 0.0),
            probs_TE=self.probs_TE.masked_fill(~real_T1, 0.0),
            num_selected_T=torch.where(valid_T, self.num_selected_T, 0),
        )


class ExpertCount(Protocol):
    """How many experts each token gets. `importance_T` is fp32 in [0, 1], or None where the router needs none."""

    needs_importance: bool

    def __call__(self, probs_TE: Tensor, importance_T: Tensor | None) -> Tensor:
        """int64 [T], each between 1 and K."""
        ...


class FixedCount(nn.Module):
    """The same K for every token."""

    needs_importance = False

    def __init__(self, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k

    def forward(self, probs_TE: Tensor, importance_T: Tensor | None) -> Tensor:
        return torch.full((probs_TE.shape[0],), self.top_k, dtype=torch.int64, device=probs_TE.device)


class PaperCount(nn.Module):
    """DA-MoE's K = ceil(I * E), clamped (arXiv 2409.06669). The mean K is whatever attention's sharpness makes it."""

    needs_importance = True

    def __init__(self, config: DAMoERouterConfig, num_experts: int, max_k: int) -> None:
        super().__init__()
        self.scale, self.min_k, self.max_k = num_experts, config.min_k, max_k

    def forward(self, probs_TE: Tensor, importance_T: Tensor | None) -> Tensor:
        assert importance_T is not None
        return torch.ceil(importance_T * self.scale).to(torch.int64).clamp_(self.min_k, self.max_k)


class BudgetedCount(nn.Module):
    """DA-MoE with a budget: K = ceil(alpha * I), clamped, where alpha holds the layer's mean K at a target.

    `log_alpha` is a controller, not a parameter: it moves once per optimizer step by the relative error of the mean K
    over the whole global batch (integer counts, so every layout computes the same number), is checkpointed, and stands
    still in evaluation. It starts where an importance of one half would give the target.
    """

    needs_importance = True
    log_alpha: Tensor

    def __init__(self, config: DAMoERouterConfig, max_k: int) -> None:
        super().__init__()
        self.mean_k, self.rate = config.mean_k, config.controller_rate
        self.min_k, self.max_k = config.min_k, max_k
        self.register_buffer("log_alpha", torch.tensor(math.log(2.0 * config.mean_k), dtype=torch.float32))

    def forward(self, probs_TE: Tensor, importance_T: Tensor | None) -> Tensor:
        assert importance_T is not None
        scaled_T = importance_T * self.log_alpha.exp()
        return torch.ceil(scaled_T).to(torch.int64).clamp_(self.min_k, self.max_k)

    def update(self, mean_k: float) -> None:
        """One controller step from the measured mean K of the global batch."""
        self.log_alpha.add_(self.rate * (self.mean_k - mean_k) / self.mean_k)


class Router(nn.Module):
    """Linear gate in fp32, softmax over all experts, the best K_t experts of each token.

    Logits are computed in fp32 whatever the model's dtype, because near-ties decide which expert runs.
    """

    def __init__(self, config: MoEConfig, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.max_k = config.max_top_k
        self.renormalize = config.router.gates == "renormalized"
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size, dtype=dtype))
        self.count = _count_of(config)

    @property
    def needs_importance(self) -> bool:
        """Whether `forward` wants the tokens' importance."""
        return self.count.needs_importance

    def forward(self, x_TD: Tensor, importance_T: Tensor | None) -> RoutingDecision:
        logits_TE = x_TD.float() @ self.weight.float().t()
        probs_TE = logits_TE.softmax(dim=-1)
        num_selected_T = self.count(probs_TE.detach(), importance_T)
        top_TK, ids_TK = probs_TE.topk(self.max_k, dim=-1)
        used_TK = torch.arange(self.max_k, device=x_TD.device) < num_selected_T[:, None]
        weights_TK = torch.where(used_TK, top_TK, 0.0)
        if self.renormalize:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return RoutingDecision(
            expert_ids_TK=torch.where(used_TK, ids_TK, -1),
            weights_TK=weights_TK,
            probs_TE=probs_TE,
            logits_TE=logits_TE,
            num_selected_T=num_selected_T,
        )


def _count_of(config: MoEConfig) -> FixedCount | PaperCount | BudgetedCount:
    router = config.router
    if isinstance(router, TopKRouterConfig):
        return FixedCount(router.top_k)
    if router.budget == "paper":
        return PaperCount(router, config.num_experts, config.max_top_k)
    return BudgetedCount(router, config.max_top_k)
