"""The experts of this rank, evaluated together.

Legend: T tokens, K expert slots a token, D hidden size, F expert width, L experts on this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moetrain.ops import PermutePlan, expert_layer


class GroupedExperts(nn.Module):
    """SwiGLU experts without biases: fc2(silu(gate) * up), where fc1's rows are gate, then up."""

    def __init__(self, num_local_experts: int, hidden_size: int, ffn_hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc1 = nn.Parameter(torch.empty(num_local_experts, 2 * ffn_hidden_size, hidden_size, dtype=dtype))
        self.fc2 = nn.Parameter(torch.empty(num_local_experts, hidden_size, ffn_hidden_size, dtype=dtype))

    def forward(self, x_TD: Tensor, weights_TK: Tensor | None, plan: PermutePlan) -> Tensor:
        """[T, D] -> [T, D], the weighted sum (None: the sum) of each token's experts. A token's result does not depend
        on the other tokens."""
        return expert_layer(x_TD, weights_TK, self.fc1, self.fc2, plan)
