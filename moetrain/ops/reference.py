"""What every operator of ``moetrain.ops`` means, in plain torch. The tests hold the compiled code to these.

Written to be read, not to be fast: loops over experts and tokens, no trick. Differentiable by torch itself,
in any floating dtype (float64 for gradient checks), on any device.

Legend: T tokens, K slots a token, R routed rows, E experts, D hidden, N out, W ranks, S sequence, B batch,
H query heads, G key heads, d head dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import relu, silu


def plan_permutation(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stable sort of the used slots by expert: the four tensors of :class:`moetrain.ops.PermutePlan`."""
    flat = expert_ids_TK.reshape(-1)
    used = (flat >= 0).nonzero().reshape(-1)
    row_slot_R = used[torch.argsort(flat[used], stable=True)]
    slot_row = torch.full_like(flat, -1)
    slot_row[row_slot_R] = torch.arange(row_slot_R.numel(), device=flat.device)
    tokens_per_expert_E = torch.bincount(flat[used], minlength=num_experts)
    row_token_R = row_slot_R // max(expert_ids_TK.size(1), 1)
    return row_token_R, row_slot_R, slot_row.view_as(expert_ids_TK), tokens_per_expert_E


def permute(x_TD: Tensor, row_token_R: Tensor) -> Tensor:
    """``rows[r] = x[row_token[r]]``."""
    return x_TD[row_token_R]


def combine(rows_RD: Tensor, weights_TK: Tensor, slot_row_TK: Tensor) -> Tensor:
    """``y[t] = sum over used slots j of weights[t, j] * rows[slot_row[t, j]]``, in float32 or wider."""
    wide = torch.promote_types(rows_RD.dtype, torch.float32)
    rows, weights = rows_RD.to(wide), weights_TK.to(wide)
    y_TD = rows.new_zeros(slot_row_TK.size(0), rows_RD.size(1))
    for slot in range(slot_row_TK.size(1)):
        tokens = (slot_row_TK[:, slot] >= 0).nonzero().reshape(-1)
        y_TD = y_TD.index_add(0, tokens, weights[tokens, slot, None] * rows[slot_row_TK[tokens, slot]])
    return y_TD.to(rows_RD.dtype)


def unpermute(rows_RD: Tensor, slot_row_TK: Tensor) -> Tensor:
    """Sum of each token's rows: :func:`combine` with weights of one."""
    return combine(rows_RD, torch.ones(slot_row_TK.shape, device=rows_RD.device), slot_row_TK)


def reorder_by_expert(counts_WE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From (source rank, expert) order to (expert, source rank) order: index, its inverse, counts."""
    counts = counts_WE.tolist()
    num_ranks, num_experts = counts_WE.shape
    starts, row = {}, 0
    for rank in range(num_ranks):
        for expert in range(num_experts):
            starts[rank, expert] = row
            row += counts[rank][expert]
    index = [
        starts[rank, expert] + i
        for expert in range(num_experts)
        for rank in range(num_ranks)
        for i in range(counts[rank][expert])
    ]
    inverse = sorted(range(len(index)), key=index.__getitem__)
    as_tensor = lambda values: torch.tensor(values, dtype=torch.int64, device=counts_WE.device)  # noqa: E731
    return as_tensor(index), as_tensor(inverse), counts_WE.sum(dim=0)


def grouped_gemm(x_RK: Tensor, w_ENK: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
    """Rows of expert ``e`` times ``w[e].T``; rows are sorted by expert. float32 or wider inside."""
    wide = torch.promote_types(x_RK.dtype, torch.float32)
    groups = x_RK.to(wide).split(tokens_per_expert_E.tolist())
    products = [rows @ w.to(wide).T for rows, w in zip(groups, w_ENK.unbind(), strict=True)]
    return torch.cat(products).to(x_RK.dtype)


def expert_layer(
    x_TD: Tensor,
    weights_TK: Tensor | None,
    fc1: Tensor,
    fc2: Tensor,
    row_token_R: Tensor,
    slot_row_TK: Tensor,
    tokens_per_expert_E: Tensor,
) -> Tensor:
    """Gather, fc1 (gate rows, then up rows), SwiGLU, fc2, weighted sum over each token's experts."""
    gate_RF, up_RF = grouped_gemm(x_TD[row_token_R], fc1, tokens_per_expert_E).chunk(2, dim=-1)
    rows_RD = grouped_gemm(silu(gate_RF) * up_RF, fc2, tokens_per_expert_E)
    return unpermute(rows_RD, slot_row_TK) if weights_TK is None else combine(rows_RD, weights_TK, slot_row_TK)


def generated_experts(
    x_TD: Tensor, down_GrD: Tensor, down_bias_Gr: Tensor, up_GDr: Tensor, up_bias_GD: Tensor, set_of_token_T: Tensor
) -> Tensor:
    """Each token through the weights of its set: ``up relu(down x + down_bias) + up_bias``, float32 or wider inside."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    x, down, down_bias, up, up_bias = (t.to(wide) for t in (x_TD, down_GrD, down_bias_Gr, up_GDr, up_bias_GD))
    outputs = [
        up[g] @ relu(down[g] @ token + down_bias[g]) + up_bias[g]
        for token, g in zip(x.unbind(), set_of_token_T.tolist(), strict=True)
    ]
    return torch.stack(outputs).to(x_TD.dtype) if outputs else x_TD.clone()


def _scores(
    q_SBHd: Tensor, k_SBGd: Tensor, causal: bool, scale: float, valid_BS: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scores ``[B, H, S, S]`` (hidden ones -inf), and which are visible ``[B, 1, S, S]``."""
    seq, batch, heads, _ = q_SBHd.shape
    wide = torch.promote_types(q_SBHd.dtype, torch.float32)
    k_SBHd = k_SBGd.repeat_interleave(heads // k_SBGd.size(2), dim=2)
    scores_BHSS = torch.einsum("ibhd,jbhd->bhij", q_SBHd.to(wide), k_SBHd.to(wide)) * scale
    visible_B1SS = torch.ones(batch, 1, seq, seq, dtype=torch.bool, device=q_SBHd.device)
    if causal:
        visible_B1SS = visible_B1SS.tril()
    if valid_BS is not None:
        visible_B1SS = visible_B1SS & valid_BS[:, None, None, :] & valid_BS[:, None, :, None]
    return scores_BHSS.masked_fill(~visible_B1SS, -math.inf), visible_B1SS


def _softmax(scores_BHSS: Tensor, visible_B1SS: Tensor) -> Tensor:
    """Rows that see nothing give zeros, with a gradient of zero."""
    sees_B1S1 = visible_B1SS.any(dim=-1, keepdim=True)
    return torch.where(sees_B1S1, scores_BHSS.masked_fill(~sees_B1S1, 0.0).softmax(dim=-1), 0.0)


def attention(
    q_SBHd: Tensor, k_SBGd: Tensor, v_SBGd: Tensor, causal: bool, scale: float, valid_BS: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``softmax(scale * q k^T) v`` as ``[S, B, H, d]``, and the log of the softmax's denominator ``[B, H, S]``.

    Tokens that are not valid are seen by nobody and see nothing: zeros, and a log of infinity.
    """
    scores_BHSS, visible_B1SS = _scores(q_SBHd, k_SBGd, causal, scale, valid_BS)
    p_BHSS = _softmax(scores_BHSS, visible_B1SS)
    v_SBHd = v_SBGd.repeat_interleave(q_SBHd.size(2) // v_SBGd.size(2), dim=2)
    context_SBHd = torch.einsum("bhij,jbhd->ibhd", p_BHSS, v_SBHd.to(p_BHSS.dtype))
    lse_BHS = scores_BHSS.logsumexp(dim=-1).masked_fill(~visible_B1SS.any(dim=-1), math.inf)
    return context_SBHd.to(q_SBHd.dtype), lse_BHS


def attention_importance(
    q_SBHd: Tensor, k_SBGd: Tensor, measure: str, causal: bool, scale: float, valid_BS: Tensor | None = None
) -> Tensor:
    """The whole attention matrix at once; see :func:`moetrain.ops.attention_with_importance` for the measures."""
    scores_BHSS, visible_B1SS = _scores(q_SBHd, k_SBGd, causal, scale, valid_BS)
    p_BHSS = _softmax(scores_BHSS, visible_B1SS)
    seen_B1S = visible_B1SS.sum(dim=-1)
    if measure == "self_weight":
        importance_BHS = p_BHSS.diagonal(dim1=-2, dim2=-1)
    elif measure == "row_max":
        importance_BHS = p_BHSS.amax(dim=-1)
    elif measure == "row_entropy":
        entropy_BHS = -torch.xlogy(p_BHSS, p_BHSS).sum(dim=-1)
        importance_BHS = torch.where(seen_B1S > 1, entropy_BHS / seen_B1S.clamp(min=2).log(), 0.0)
    elif measure == "col_max":
        importance_BHS = p_BHSS.amax(dim=-2)
    else:
        importance_BHS = p_BHSS.sum(dim=-2)
    return importance_BHS.sum(dim=1).T
