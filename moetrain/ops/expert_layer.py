"""The experts of one rank as one operator: gather, fc1, SwiGLU, fc2, weighted combine.

Legend: T tokens, K expert slots a token, R routed rows, E experts, D hidden size, F expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moetrain.ops.grouped_gemm import grouped_gemm
from moetrain.ops.permute import PermutePlan, combine, permute


def expert_layer(x_TD: Tensor, weights_TK: Tensor | None, fc1: Tensor, fc2: Tensor, plan: PermutePlan) -> Tensor:
    """``y[t] = sum over used slots j of weights[t, j] * fc2[e] (silu(gate) * up)`` with ``gate, up = fc1[e] x[t]``.

    Args:
        x_TD: float32 or bfloat16.
        weights_TK: float32, or None for weights of one.
        fc1: ``[E, 2F, D]``, gate rows, then up rows; dtype of ``x_TD``.
        fc2: ``[E, D, F]``.
        plan: which slot goes to which expert; slots may be unused.

    Returns:
        ``[T, D]``; zero for a token without experts. Differentiable in everything but the plan.
    """
    gate_RF, up_RF = grouped_gemm(permute(x_TD, plan), fc1, plan.tokens_per_expert_E).chunk(2, dim=-1)
    rows_RD = grouped_gemm(F.silu(gate_RF) * up_RF, fc2, plan.tokens_per_expert_E)
    if weights_TK is None:
        weights_TK = torch.ones(plan.slot_row_TK.shape, dtype=torch.float32, device=x_TD.device)
    return combine(rows_RD, weights_TK, plan)
