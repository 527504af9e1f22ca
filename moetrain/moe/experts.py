"""The experts of this rank, evaluated together.

Legend: T tokens, K expert slots a token, R routed rows, D hidden size, F expert width, L experts on this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moetrain.config.model import Activation
from moetrain.config.size import projections_in
from moetrain.ops import PermutePlan, combine, expert_layer, grouped_gemm, permute, unpermute


def run_experts(
    x_TD: Tensor,
    weights_TK: Tensor | None,
    fc1: Tensor,
    fc2: Tensor,
    plan: PermutePlan,
    activation: Activation,
) -> Tensor:
    """`moetrain.ops.expert_layer`, whose activation is SwiGLU; for ReLU the same of grouped products, with fc1
    [L, F, D]. These keep a copy of the routed rows, the activation and the results for the backward pass."""
    if activation == "swiglu":
        return expert_layer(x_TD, weights_TK, fc1, fc2, plan)
    hidden_RF = F.relu(grouped_gemm(permute(x_TD, plan), fc1, plan.tokens_per_expert_E))
    rows_RD = grouped_gemm(hidden_RF, fc2, plan.tokens_per_expert_E)
    return unpermute(rows_RD, plan) if weights_TK is None else combine(rows_RD, weights_TK, plan)


class GroupedExperts(nn.Module):
    """Experts without biases: fc2(silu(gate) * up), where fc1's rows are gate, then up; or fc2(relu(fc1))."""

    def __init__(
        self,
        num_local_experts: int,
        hidden_size: int,
        ffn_hidden_size: int,
        dtype: torch.dtype,
        activation: Activation = "swiglu",
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        rows = projections_in(activation) * ffn_hidden_size
        self.fc1 = nn.Parameter(torch.empty(num_local_experts, rows, hidden_size, dtype=dtype))
        self.fc2 = nn.Parameter(torch.empty(num_local_experts, hidden_size, ffn_hidden_size, dtype=dtype))

    def forward(self, x_TD: Tensor, weights_TK: Tensor | None, plan: PermutePlan) -> Tensor:
        """[T, D] -> [T, D], the weighted sum (None: the sum) of each token's experts. A token's result does not depend
        on the other tokens."""
        return run_experts(x_TD, weights_TK, self.fc1, self.fc2, plan, self.activation)
