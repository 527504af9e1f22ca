"""Attention that also tells how important each token is, for routers that choose the number of experts by it (DA-MoE).

Legend: S sequence, B batch, H query heads, G key heads (H a multiple of G), d head dimension. No function here
communicates.

Source: DA-MoE, arXiv 2409.06669 (``row_max`` and ``col_max`` are the two readings of its maximum);
``self_weight`` and ``row_entropy`` are ours: causal, so fit for a decoder; ``col_sum`` is attention received.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moetrain.ops import library as _library  # noqa: F401  (registers the operators)

_ops = torch.ops.moetrain
_aten = torch.ops.aten

CAUSAL_MEASURES = frozenset({"self_weight", "row_max", "row_entropy"})
"""Under a causal mask these depend on no later token."""

NONCAUSAL_MEASURES = frozenset({"col_max", "col_sum"})
"""These look at later queries, whatever the mask: a decoder must not route by them."""


def attention_with_importance(
    q_SBHd: Tensor,
    k_SBGd: Tensor,
    v_SBGd: Tensor,
    measure: str,
    causal: bool,
    scale: float,
    valid_BS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact attention ``[S, B, H, d]``, and a statistic of its weights per token: float32 ``[S, B]``, summed over the
    given heads.

    The caller divides by the global number of heads, after summing over tensor-parallel ranks. The gradient flows
    through the attention; importance has none. Memory beside the output: O(S), never a matrix of scores.

    Measures, of the weights ``A = softmax(scale * q k^T)`` (after the masks):
        self_weight: ``A[i, i]``.
        row_max: the largest weight that query ``i`` gives, ``max_j A[i, j]``.
        row_entropy: ``-sum_j A[i, j] ln A[i, j] / ln(number of keys i sees)``, in ``[0, 1]``; 0 with one key.
        col_max: the largest weight that key ``j`` gets, ``max_i A[i, j]``. **Sees later queries.**
        col_sum: the weight that key ``j`` gets in all, ``sum_i A[i, j]``. **Sees later queries.**

    Args:
        q_SBHd: float32 or bfloat16, and float16 on CUDA; the last axis contiguous, or it is copied.
        k_SBGd: same dtype.
        v_SBGd: the shape of ``k_SBGd``.
        measure: one of ``CAUSAL_MEASURES`` or ``NONCAUSAL_MEASURES``. Those of rows are computed in the pass of
            attention itself on the CPU; the others take a second pass, without the values.
        causal: query ``i`` sees keys up to ``i``.
        scale: of the scores, above zero.
        valid_BS: bool, True = a real token. Others are seen by nobody and see nothing: their output and importance
            are zero, and they do not count in a column.

    On the CPU, and with a causal mask, output and row measures at a position do not change by a bit when later tokens
    do, or when there are more of them. The bits do not depend on the number of threads.

    Raises:
        ValueError: an unknown measure; shapes, dtypes or devices that do not agree.
    """
    legal = sorted(CAUSAL_MEASURES | NONCAUSAL_MEASURES)
    if measure not in legal:
        raise ValueError(f"importance measure is {measure!r}; legal values are {legal}")
    if q_SBHd.device.type == "cpu":
        context_SBHd, _, importance_SB = _ops.attention_forward(
            q_SBHd, k_SBGd, v_SBGd, measure, causal, scale, valid_BS
        )
        return context_SBHd, importance_SB
    context_SBHd, lse_BHS = _cuda_attention(q_SBHd, k_SBGd, v_SBGd, causal, scale, valid_BS)
    with torch.no_grad():
        importance_SB = _ops.importance_from_lse(q_SBHd, k_SBGd, lse_BHS, measure, causal, scale, valid_BS)
    return context_SBHd, importance_SB


def weights_importance(weights_BHSS: Tensor, measure: str, causal: bool, valid_BS: Tensor | None = None) -> Tensor:
    """A measure of :func:`attention_with_importance` from attention's weights themselves, float32 ``[S, B]``: for
    scores that the operator cannot take, such as those with a bias. Rows of tokens that are not valid count as zeros,
    whatever stands there; hidden weights must be zero.
    """
    seq = weights_BHSS.size(-1)
    real_BS = weights_BHSS.new_ones(weights_BHSS.size(0), seq, dtype=torch.bool) if valid_BS is None else valid_BS
    weights_BHSS = weights_BHSS.float().masked_fill(~real_BS[:, None, :, None], 0.0)
    if measure == "self_weight":
        per_head_BHS = weights_BHSS.diagonal(dim1=-2, dim2=-1)
    elif measure == "row_max":
        per_head_BHS = weights_BHSS.amax(dim=-1)
    elif measure == "row_entropy":
        keys_BS = real_BS.cumsum(dim=1) if causal else real_BS.sum(dim=1, keepdim=True).expand_as(real_BS)
        entropy_BHS = -torch.xlogy(weights_BHSS, weights_BHSS).sum(dim=-1)
        per_head_BHS = entropy_BHS / keys_BS.clamp(min=2).log()[:, None]
    elif measure == "col_max":
        per_head_BHS = weights_BHSS.amax(dim=-2)
    elif measure == "col_sum":
        per_head_BHS = weights_BHSS.sum(dim=-2)
    else:
        raise ValueError(
            f"importance measure is {measure!r}; legal values are {sorted(CAUSAL_MEASURES | NONCAUSAL_MEASURES)}"
        )
    return per_head_BHS.sum(dim=1).masked_fill(~real_BS, 0.0).t().contiguous()


def _cuda_attention(
    q_SBHd: Tensor, k_SBGd: Tensor, v_SBGd: Tensor, causal: bool, scale: float, valid_BS: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Torch's fused attention, by the kernels that return the log-sum-exp ``[B, H, S]``; differentiable."""
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q_SBHd, k_SBGd, v_SBGd))
    # Flash attention takes 16-bit heads of whole 16 bytes and no padding mask; memory-efficient attention the rest.
    if valid_BS is None and q.dtype != torch.float32 and q.size(3) % 8 == 0:
        context, lse = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]
        return context.permute(2, 0, 1, 3), lse
    heads = q.size(1) // k.size(1)
    k, v = (t.repeat_interleave(heads, dim=1) for t in (k, v))
    bias = None if valid_BS is None else _bias_of(valid_BS, q)
    context, lse = _aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, causal, scale=scale)[:2]
    if valid_BS is not None:
        context = context.masked_fill(~valid_BS[:, None, :, None], 0.0)
    # Its log-sum-exp is padded to whole blocks.
    return context.permute(2, 0, 1, 3), lse[..., : q.size(2)].contiguous()


def _bias_of(valid_BS: Tensor, q_BHSd: Tensor) -> Tensor:
    """Hides padding: ``[B, H, S, S]`` over ``[B, S]`` numbers. Finite, so that a row of padding alone is no NaN."""
    batch, heads, seq, _ = q_BHSd.shape
    aligned = valid_BS.new_zeros(batch, -(-seq // 16) * 16)  # the kernel reads whole vectors
    aligned[:, :seq] = valid_BS
    bias = torch.zeros_like(aligned, dtype=q_BHSd.dtype).masked_fill(~aligned, torch.finfo(q_BHSd.dtype).min)
    return bias[:, None, None, :seq].expand(batch, heads, seq, seq)


@torch.library.register_fake("moetrain::attention_forward")
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, measure: str, causal: bool, scale: float, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    seq, batch, heads, _ = q.shape
    return (
        torch.empty(q.shape, dtype=q.dtype, device=q.device),
        q.new_empty(batch, heads, seq, dtype=torch.float32),
        q.new_empty(seq, batch, dtype=torch.float32),
    )


@torch.library.register_fake("moetrain::importance_from_lse")
def _from_lse_fake(
    q: Tensor, k: Tensor, lse: Tensor, measure: str, causal: bool, scale: float, valid: Tensor | None
) -> Tensor:
    return q.new_empty(q.size(0), q.size(1), dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, _, ctx.causal, ctx.scale, valid = inputs
    out, lse, importance = output
    ctx.save_for_backward(q, k, v, out, lse, valid)
    ctx.mark_non_differentiable(lse, importance)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, valid = ctx.saved_tensors
    if grad is None:
        return (None,) * 7
    if q.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v), None, None, None, None
    bias = None
    if valid is not None:
        # Queries that see nothing need no mask: their log-sum-exp is infinite, so all their weights are zero.
        bias = torch.zeros(valid.shape, dtype=q.dtype).masked_fill(~valid, -torch.inf)[:, None, None, :]
    # Torch's kernel takes the last axis for contiguous without a look.
    operands = [t if t.stride(3) == 1 else t.contiguous() for t in (grad, q, k, v, out)]
    grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(t.permute(1, 2, 0, 3) for t in operands), lse, 0.0, ctx.causal, attn_mask=bias, scale=ctx.scale
    )
    return *(g.permute(2, 0, 1, 3) for g in grads), None, None, None, None


torch.library.register_autograd("moetrain::attention_forward", _backward, setup_context=_setup)
