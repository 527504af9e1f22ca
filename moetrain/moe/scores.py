"""From a gate's logits to scores, and to the groups of experts that a token may choose from.

All of it row by row: a token's bits may not depend on how many tokens stand beside it.

Legend: T tokens, E experts, G groups of experts.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

_TINY = 1e-20  # DeepSeek-V3's; where all affinities have vanished, shares are 0 and not NaN


def scores_of(logits_TE: Tensor, kind: Literal["softmax", "sigmoid"]) -> Tensor:
    """Probabilities over all experts, or each expert's own affinity; fp32 [T, E]."""
    return logits_TE.softmax(dim=-1) if kind == "softmax" else sigmoid(logits_TE)


def sigmoid(logits_TE: Tensor) -> Tensor:
    """As the softmax of (logit, 0). torch.sigmoid computes a tensor's last elements, which are too few for a vector,
    by another formula than the others: with 8 experts, tokens at the end of a batch differ in their last bits."""
    return torch.stack([logits_TE, torch.zeros_like(logits_TE)], dim=-1).softmax(dim=-1)[..., 0]


def shares(values: Tensor) -> Tensor:
    """Non-negative values divided by their sum over the last dimension."""
    return values / values.sum(dim=-1, keepdim=True).clamp(min=_TINY)


def only_best_groups(order_TE: Tensor, groups: int, top_groups: int, score: Literal["top2_sum", "max"]) -> Tensor:
    """`order_TE` where the expert's group is among the token's `top_groups` best, else -inf.

    A group is worth the sum of its two best experts (DeepSeek-V3, arXiv 2412.19437 section 2.1.2), or its best
    (DeepSeek-V2, arXiv 2405.04434 section 2.1.3, whose groups are devices).
    """
    if top_groups == groups:
        return order_TE
    size = order_TE.shape[1] // groups
    best_TGX = order_TE.unflatten(1, (groups, size)).topk(min(size, 2 if score == "top2_sum" else 1), dim=-1).values
    chosen_TG = best_TGX.sum(dim=-1).topk(top_groups, dim=-1).indices
    allowed_TG = torch.zeros(len(order_TE), groups, dtype=torch.bool, device=order_TE.device)
    allowed_TG.scatter_(1, chosen_TG, True)
    return order_TE.masked_fill(~allowed_TG.repeat_interleave(size, dim=1), -torch.inf)
