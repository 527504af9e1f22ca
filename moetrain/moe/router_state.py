"""What a router knows of the MoE layer before, token by token.

recurrent (RMoE, arXiv 2408.06793): h_l = GRU(W1_l x, h_{l-1}), logits = W2_l h_l. W1 and the gate W2 belong to the
layer; one GRU serves all layers.
gating_residual (MoE++, arXiv 2410.07348, Eq. 6): logits_l = W_l x + Wg_l logits_{l-1}.

Before the first MoE layer the state is zero. Gradients flow through it from layer to layer, and with the activations
across pipeline stages.

Legend: T tokens, D hidden size, P size of the state, G size of the gate's input.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moetrain.config.moe import MoEConfig
from moetrain.config.relatives import state_width
from moetrain.ops import row_invariant_linear


class RouterGRU(nn.Module):
    """The cell that all layers share, with the equations and the row order (reset, update, new) of `torch.nn.GRU`.

    Under pipeline parallelism every stage with a MoE layer holds a copy, tied as the hypernetwork's are.
    """

    def __init__(self, width: int, users: tuple[int, ...], dtype: torch.dtype) -> None:
        """`users`: global numbers of the layers, of all ranks, that share it."""
        super().__init__()
        self.users = users
        self.input = nn.Linear(width, 3 * width, dtype=dtype)
        self.state = nn.Linear(width, 3 * width, dtype=dtype)

    def forward(self, x_TP: Tensor, before_TP: Tensor) -> Tensor:
        """The next state, fp32 [T, P]. Rows do not depend on one another."""
        from_x = _wide_linear(x_TP, self.input).chunk(3, dim=-1)
        from_state = _wide_linear(before_TP, self.state).chunk(3, dim=-1)
        reset_TP = torch.sigmoid(from_x[0] + from_state[0])
        update_TP = torch.sigmoid(from_x[1] + from_state[1])
        new_TP = torch.tanh(from_x[2] + reset_TP * from_state[2])
        return (1.0 - update_TP) * new_TP + update_TP * before_TP.float()


class RouterMemory(nn.Module):
    """One layer's part: from the token and the former state to what the gate multiplies."""

    def __init__(self, moe: MoEConfig, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        assert moe.router_state is not None
        self.width, self.recurrent = state_width(moe), moe.router_state.type == "recurrent"
        if self.recurrent:
            self.project = nn.Linear(hidden_size, self.width, bias=False, dtype=dtype)

    def gate_input(self, x_TD: Tensor, before_TP: Tensor, gru: RouterGRU | None) -> Tensor:
        """fp32 [T, G]; of a recurrent router it is also the next state. Else the next state is the gate's scores."""
        if not self.recurrent:
            return torch.cat([x_TD.float(), before_TP.float()], dim=-1)
        assert gru is not None
        return gru(_wide_linear(x_TD, self.project), before_TP)


def _wide_linear(x_TN: Tensor, layer: nn.Linear) -> Tensor:
    """In fp32 whatever the model's dtype, as the gate."""
    bias = None if layer.bias is None else layer.bias.float()
    return row_invariant_linear(x_TN.float(), layer.weight.float(), bias)
