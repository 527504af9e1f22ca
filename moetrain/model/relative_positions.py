"""Relative positions: a learned number for each head and bucket of distances, added to the scores of attention, the
same table in every layer (T5, arXiv 1910.10683, section 2.1).

Legend: S sequence positions, B sequences, H local query heads, G local key/value heads, d head width, N buckets.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moetrain.config.model import ModelConfig
from moetrain.ops import weights_importance


class RelativePositions(nn.Module):
    """The table, split by heads over the tensor ranks.

    Under pipeline parallelism every stage has a copy. The copies start equal, their gradients are summed over the
    stages before the step, and the table counts once in the gradient norm and in checkpoints.
    """

    def __init__(self, model: ModelConfig, tensor_ranks: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.users = tuple(range(model.num_layers))
        heads = model.num_attention_heads // tensor_ranks
        self.weight = nn.Parameter(torch.empty(model.relative_buckets, heads, dtype=dtype))
        self.both_directions = model.type == "encoder"
        self.max_distance = model.relative_max_distance
        self._buckets_SS = torch.empty(0, 0, dtype=torch.int64)

    def forward(self, length: int) -> Tensor:
        """What is added to the score of query i and key j, [H, S, S] in the dtype of the table."""
        if self._buckets_SS.shape[0] != length or self._buckets_SS.device != self.weight.device:
            # On the CPU whatever the device: a logarithm that is off by its last bit may fall into another bucket.
            distance_SS = torch.arange(length)[None, :] - torch.arange(length)[:, None]
            buckets_SS = bucket_of(distance_SS, self.weight.shape[0], self.max_distance, self.both_directions)
            self._buckets_SS = buckets_SS.to(self.weight.device)
        return F.embedding(self._buckets_SS, self.weight).permute(2, 0, 1)


def bucket_of(distance: Tensor, buckets: int, max_distance: int, both_directions: bool) -> Tensor:
    """Row of the table for (position of the key) - (position of the query), int64.

    Each direction's first half of rows are single distances, the other half logarithmic ranges up to `max_distance`,
    beyond which all is one. Without `both_directions` later keys count as distance 0: nobody sees them. The arithmetic
    is T5's, in fp32, because an imported table means these very rows.
    """
    first = torch.zeros_like(distance)
    if both_directions:
        buckets //= 2
        first = (distance > 0).long() * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    share = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (share * (buckets - exact)).long()).clamp(max=buckets - 1)
    return first + torch.where(distance < exact, distance, far)


def biased_attention(
    q_SBHd: Tensor,
    k_SBGd: Tensor,
    v_SBGd: Tensor,
    bias_HSS: Tensor,
    measure: str | None,
    causal: bool,
    scale: float,
    valid_BS: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """softmax(scale * q k^T + bias) v, [S, B, H, d], and with a `measure` the importance of the tokens by these same
    weights, fp32 [S, B], summed over the heads, as `moetrain.ops.attention_with_importance` has it.

    Tokens that are not valid are seen by nobody and see nothing: zeros. Memory: H S S numbers a sequence, with a
    measure in fp32; without one torch chooses how (on CUDA by blocks, but for the bias itself).
    """
    bias_BHSS = _masked(bias_HSS.to(q_SBHd.dtype), causal, valid_BS)
    heads = q_SBHd.shape[2] // k_SBGd.shape[2]
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q_SBHd, k_SBGd, v_SBGd))
    k, v = (t.repeat_interleave(heads, dim=1) if heads > 1 else t for t in (k, v))
    if measure is None:
        context_BHSd, importance_SB = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_BHSS, scale=scale), None
    else:
        weights_BHSS = (scale * (q.float() @ k.float().transpose(2, 3)) + bias_BHSS.float()).softmax(dim=-1)
        context_BHSd = (weights_BHSS @ v.float()).to(q.dtype)
        importance_SB = weights_importance(weights_BHSS.detach(), measure, causal, valid_BS)
    if valid_BS is not None:
        context_BHSd = context_BHSd.masked_fill(~valid_BS[:, None, :, None], 0.0)
    return context_BHSd.permute(2, 0, 1, 3), importance_SB


def _masked(bias_HSS: Tensor, causal: bool, valid_BS: Tensor | None) -> Tensor:
    """[1 or B, H, S, S], with keys that a query does not see at the least number there is: finite, so that a row of
    padding alone is no NaN."""
    least, length = torch.finfo(bias_HSS.dtype).min, bias_HSS.shape[1]
    bias_BHSS = bias_HSS[None]
    if causal:
        later_SS = torch.ones(length, length, dtype=torch.bool, device=bias_HSS.device).triu(1)
        bias_BHSS = bias_BHSS.masked_fill(later_SS, least)
    if valid_BS is not None:
        bias_BHSS = bias_BHSS.expand(valid_BS.shape[0], -1, -1, -1).masked_fill(~valid_BS[:, None, None, :], least)
    return bias_BHSS
