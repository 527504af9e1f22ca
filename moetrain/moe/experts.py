"""The experts of this rank, evaluated together.

Legend: M rows sorted by local expert, D hidden size, F expert width, L experts on this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moetrain.ops import grouped_gemm


class GroupedExperts(nn.Module):
    """SwiGLU experts without biases: fc2(silu(gate) * up), where fc1's rows are gate, then up."""

    def __init__(self, num_local_experts: int, hidden_size: int, ffn_hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc1 = nn.Parameter(torch.empty(num_local_experts, 2 * ffn_hidden_size, hidden_size, dtype=dtype))
        self.fc2 = nn.Parameter(torch.empty(num_local_experts, hidden_size, ffn_hidden_size, dtype=dtype))

    def forward(self, rows_MD: Tensor, tokens_per_expert_L: Tensor) -> Tensor:
        """[M, D] -> [M, D]. A row's result does not depend on the other rows."""
        gate_MF, up_MF = grouped_gemm(rows_MD, self.fc1, tokens_per_expert_L).chunk(2, dim=-1)
        return grouped_gemm(F.silu(gate_MF) * up_MF, self.fc2, tokens_per_expert_L)
