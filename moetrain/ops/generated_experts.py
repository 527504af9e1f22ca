"""HyperMoE's generated experts, one weight set per distinct set of selected experts.

Legend: T tokens, G sets, D hidden size, r bottleneck. No function here communicates.

Source: the adapter of arXiv 2402.12656 and its official code (Bumble666/Hyper_MoE).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moetrain.ops import library as _library  # noqa: F401  (registers the operators)
from moetrain.ops.grouped_gemm import grouped_gemm
from moetrain.ops.permute import PermutePlan, permute, unpermute

_ops = torch.ops.moetrain


def generated_experts(
    x_TD: Tensor, down_GrD: Tensor, down_bias_Gr: Tensor, up_GDr: Tensor, up_bias_GD: Tensor, plan: PermutePlan
) -> Tensor:
    """``y[t] = up[g] relu(down[g] x[t] + down_bias[g]) + up_bias[g]`` for the set ``g`` of token t: ``[T, D]``.

    Args:
        x_TD: float32 or bfloat16; everything else in the same dtype.
        plan: of the set of each token, one slot a token, all used.

    Row-invariant, as :func:`moetrain.ops.grouped_gemm`; no per-token weight exists.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or the plan leaves a token out.
    """
    if x_TD.is_cuda:  # the grouped products are fused there; the biases are cheap beside the launch of one more kernel
        set_of_row_T = torch.repeat_interleave(
            torch.arange(down_GrD.size(0), device=x_TD.device), plan.tokens_per_expert_E, output_size=x_TD.size(0)
        )
        z_Tr = grouped_gemm(permute(x_TD, plan), down_GrD, plan.tokens_per_expert_E)
        z_Tr = F.relu(z_Tr + down_bias_Gr[set_of_row_T])
        return unpermute(grouped_gemm(z_Tr, up_GDr, plan.tokens_per_expert_E) + up_bias_GD[set_of_row_T], plan)
    y_TD, _ = _ops.generated_experts(
        x_TD, down_GrD, down_bias_Gr, up_GDr, up_bias_GD, plan.row_token_R, plan.tokens_per_expert_E
    )
    return y_TD


@torch.library.register_fake("moetrain::generated_experts")
def _fake(
    x: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, row_token: Tensor, tokens_per_set: Tensor
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.size(0), down.size(1))


@torch.library.register_fake("moetrain::generated_experts_backward")
def _backward_fake(
    grad: Tensor, x: Tensor, down: Tensor, up: Tensor, row_token: Tensor, tokens_per_set: Tensor, z: Tensor
) -> tuple[Tensor, ...]:
    sets, bottleneck, hidden = down.shape
    shapes = [x.shape, down.shape, (sets, bottleneck), up.shape, (sets, hidden)]
    return tuple(x.new_empty(shape) for shape in shapes)
