"""The expert that every token gets (DeepSeekMoE, arXiv 2401.06066).

Legend: T tokens, D hidden size, F its width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moetrain.config.model import Activation
from moetrain.config.size import projections_in


class SharedExpert(nn.Module):
    """An expert without biases on the tokens' home rank, with weight 1; as an expert, but in the layout of dense
    weights. It works while the routed rows travel."""

    def __init__(
        self, hidden_size: int, ffn_hidden_size: int, dtype: torch.dtype, activation: Activation = "swiglu"
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        rows = projections_in(activation) * ffn_hidden_size
        self.fc1 = nn.Parameter(torch.empty(rows, hidden_size, dtype=dtype))
        self.fc2 = nn.Parameter(torch.empty(hidden_size, ffn_hidden_size, dtype=dtype))

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D]. T is the same whatever the tokens are, so a plain product keeps the future out."""
        if self.activation == "relu":
            return F.linear(F.relu(F.linear(x_TD, self.fc1)), self.fc2)
        gate_TF, up_TF = F.linear(x_TD, self.fc1).chunk(2, dim=-1)
        return F.linear(F.silu(gate_TF) * up_TF, self.fc2)
