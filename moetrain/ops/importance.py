"""How important a token is to attention, for routers that choose the number of experts by it (DA-MoE).

Legend: S sequence, B batch, H query heads, G key heads (H a multiple of G), d head dimension, Q queries of a
block, V visible keys of a block, P query heads a key head. No function here communicates.

Source: DA-MoE, arXiv 2409.06669 (``row_max`` and ``col_max`` are the two readings of its maximum);
``self_weight`` and ``row_entropy`` are ours: causal, so fit for a decoder.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CAUSAL_MEASURES = frozenset({"self_weight", "row_max", "row_entropy"})
"""Under a causal mask these depend on no later token."""

NONCAUSAL_MEASURES = frozenset({"col_max"})
"""These look at later queries, whatever the mask: a decoder must not route by them."""

BLOCK_SCORES = 1 << 22
"""Attention scores in memory at once, over all heads (16 MB)."""


class _Block(NamedTuple):
    """Scores of some queries against the keys that any of them may see; hidden ones are -inf."""

    first: int
    scores_BGPQV: Tensor
    visible_Q: Tensor


def _blocks(q_SBHd: Tensor, k_SBGd: Tensor, causal: bool, scale: float) -> Iterator[_Block]:
    seq, batch, heads, _ = q_SBHd.shape
    groups = k_SBGd.size(2)
    q_BGPSd = q_SBHd.float().unflatten(2, (groups, heads // groups)).permute(1, 2, 3, 0, 4)
    k_BG1dS = k_SBGd.float().permute(1, 2, 3, 0).unsqueeze(2)
    rows = max(1, BLOCK_SCORES // max(1, batch * heads * seq))
    for first in range(0, seq, rows):
        end = min(first + rows, seq)
        keys = end if causal else seq
        scores = torch.matmul(q_BGPSd[..., first:end, :] * scale, k_BG1dS[..., :keys])
        query_Q = torch.arange(first, end, device=scores.device)
        if causal:
            hidden_QV = torch.arange(keys, device=scores.device) > query_Q[:, None]
            scores.masked_fill_(hidden_QV, -math.inf)
        yield _Block(first, scores, query_Q + 1 if causal else torch.full_like(query_Q, seq))


def _row_measure(block: _Block, measure: str) -> Tensor:
    """``[B, G, P, Q]``, from the rows of the softmax."""
    scores = block.scores_BGPQV
    if measure == "row_max":
        # The largest weight is exp(0) over the softmax's denominator.
        return 1.0 / (scores - scores.amax(dim=-1, keepdim=True)).exp_().sum(dim=-1)
    log_p = scores.log_softmax(dim=-1)
    if measure == "self_weight":
        return log_p.diagonal(offset=block.first, dim1=-2, dim2=-1).exp()
    entropy = -torch.nan_to_num_(log_p.exp() * log_p, nan=0.0).sum(dim=-1)
    return torch.where(block.visible_Q > 1, entropy / block.visible_Q.clamp(min=2).log(), 0.0)


def _check(q_SBHd: Tensor, k_SBGd: Tensor, measure: str) -> None:
    legal = sorted(CAUSAL_MEASURES | NONCAUSAL_MEASURES)
    if measure not in legal:
        raise ValueError(f"importance measure is {measure!r}; legal values are {legal}")
    if q_SBHd.dim() != 4 or k_SBGd.dim() != 4:
        raise ValueError(f"q and k must be [S, B, heads, d], they are {tuple(q_SBHd.shape)} and {tuple(k_SBGd.shape)}")
    seq, batch, heads, width = q_SBHd.shape
    if k_SBGd.shape[:2] != (seq, batch) or k_SBGd.size(3) != width or heads % max(k_SBGd.size(2), 1):
        raise ValueError(
            f"k is {tuple(k_SBGd.shape)}, q {tuple(q_SBHd.shape)}: sequence, batch and head dimension "
            "must agree, and the query heads be a multiple of the key heads"
        )


@torch.no_grad()
def attention_importance(q_SBHd: Tensor, k_SBGd: Tensor, measure: str, causal: bool, scale: float) -> Tensor:
    """Sum over the given heads of a statistic of ``softmax(scale * q k^T)``, per token: float32 ``[S, B]``.

    The caller divides by the global number of heads, after summing over tensor-parallel ranks. No gradient.

    Measures, of the attention weights ``A`` (after the causal mask, if ``causal``):
        self_weight: ``A[i, i]``.
        row_max: the largest weight that query ``i`` gives, ``max_j A[i, j]``.
        row_entropy: ``-sum_j A[i, j] ln A[i, j] / ln(number of keys i sees)``, in ``[0, 1]``; 0 with one key.
        col_max: the largest weight that key ``j`` gets, ``max_i A[i, j]``. **Sees later queries.**

    Works through blocks of queries with at most ``BLOCK_SCORES`` scores (or one query's) in memory. With the
    causal mask, measures in ``CAUSAL_MEASURES`` at a position do not change by a bit when later tokens do.

    Raises:
        ValueError: an unknown measure, or shapes that do not agree.
    """
    _check(q_SBHd, k_SBGd, measure)
    seq, batch = q_SBHd.shape[:2]
    if measure == "col_max":
        received_BGPS = q_SBHd.new_zeros(
            batch, k_SBGd.size(2), q_SBHd.size(2) // max(k_SBGd.size(2), 1), seq, dtype=torch.float32
        )
        for block in _blocks(q_SBHd, k_SBGd, causal, scale):
            weights = block.scores_BGPQV.softmax(dim=-1).amax(dim=-2)
            seen = received_BGPS[..., : weights.size(-1)]
            torch.maximum(seen, weights, out=seen)
        return received_BGPS.sum(dim=(1, 2)).t().contiguous()
    parts = [_row_measure(block, measure).sum(dim=(1, 2)) for block in _blocks(q_SBHd, k_SBGd, causal, scale)]
    return torch.cat(parts, dim=1).t().contiguous() if parts else q_SBHd.new_zeros(seq, batch, dtype=torch.float32)
