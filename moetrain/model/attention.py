"""The attention core: exact attention, and beside it the importance of each token that DA-MoE routes by.

Legend: S sequence positions, B sequences, H local query heads, G local key/value heads, d head width.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from moetrain.model.relative_positions import RelativePositions, biased_attention
from moetrain.ops import attention_with_importance


class ImportanceAttention(nn.Module):
    """Scaled-dot-product attention in Megatron's `core_attention` slot, causal or over the whole sequence.

    With a `measure`, each forward also computes the tokens' importance and keeps it until `take_importance`: Megatron's
    attention module returns one tensor only, and the MoE layer of the same transformer layer asks for it next. The mask
    of a padded batch is kept until `take_valid` for the same reason.

    `attention_mask` is not Megatron's [1, 1, S, S] but [B, S], True = a real token: Megatron hands it through from the
    model's call to here unchanged. Padding is seen by nobody and sees nothing.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: object,
        attention_type: str,
        measure: str | None,
        tensor_group: dist.ProcessGroup,
        teacher: str | None = None,
        positions: RelativePositions | None = None,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: object = None,
    ) -> None:
        """Megatron passes everything but `measure`, `teacher`, `positions` and `tensor_group`, which come from the
        module spec."""
        super().__init__()
        assert measure is None or teacher is None
        self.measure, self.teacher, self.tensor_group = measure, teacher, tensor_group
        self.num_heads = config.num_attention_heads
        assert config.kv_channels is not None
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self.causal = attn_mask_type is not AttnMaskType.padding
        # In a tuple, because the table belongs to the model and must not be registered once per layer.
        self._positions = (positions,)
        self._importance_SB: Tensor | None = None
        self._valid_SB: Tensor | None = None

    def forward(
        self,
        query_SBHd: Tensor,
        key_SBGd: Tensor,
        value_SBGd: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: object = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: object = None,
    ) -> Tensor:
        """[S, B, H * d].

        Communication: with a measure, an all-reduce of [S, B] fp32 over the tensor ranks, which split the heads.
        """
        assert attention_bias is None and packed_seq_params is None
        valid_BS = attention_mask
        self._valid_SB = None if valid_BS is None else valid_BS.t()
        measure = "col_sum" if self.teacher is not None and self.training else self.measure
        (positions,) = self._positions
        if positions is not None:
            bias_HSS = positions(query_SBHd.shape[0])
            context, total_SB = biased_attention(
                query_SBHd, key_SBGd, value_SBGd, bias_HSS, measure, self.causal, self.scale, valid_BS
            )
            self._keep_importance(total_SB)
            return context.flatten(2)
        if measure is not None or valid_BS is not None:
            # Our operator also where only the mask asks for it: torch's makes NaN of a row that sees nothing.
            context, total_SB = attention_with_importance(
                query_SBHd, key_SBGd, value_SBGd, measure or "self_weight", self.causal, self.scale, valid_BS
            )
            self._keep_importance(total_SB if measure is not None else None)
            return context.flatten(2)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query_SBHd, key_SBGd, value_SBGd))
        grouped = q.shape[1] != k.shape[1]
        context = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, scale=self.scale, enable_gqa=grouped)
        return context.permute(2, 0, 1, 3).flatten(2)

    def take_importance(self) -> Tensor | None:
        """Importance of the tokens of the last forward, fp32 [S, B] over the whole sequence, averaged over all heads
        of all tensor ranks; None without a measure. Handed out once."""
        importance_SB, self._importance_SB = self._importance_SB, None
        return importance_SB

    def take_valid(self) -> Tensor | None:
        """Which tokens of the last forward are real, bool [S, B] over the whole sequence; None if all. Handed out
        once."""
        valid_SB, self._valid_SB = self._valid_SB, None
        return valid_SB

    def _keep_importance(self, total_SB: Tensor | None) -> None:
        """For `take_importance`; None without a measure."""
        if total_SB is None:
            return
        self._importance_SB = self._mean_over_heads(total_SB)
        if self.teacher is not None:
            self._importance_SB = received_rank(self._importance_SB, relative=self.teacher == "relative")

    def _mean_over_heads(self, total_SB: Tensor) -> Tensor:
        if self.tensor_group.size() > 1:
            dist.all_reduce(total_SB, group=self.tensor_group)
        return total_SB / self.num_heads


def received_rank(received_SB: Tensor, relative: bool) -> Tensor:
    """Rank of each token in its sequence by the attention that it receives under a causal mask, in (0, 1), fp32 [S, B].

    Early tokens are seen by more queries and share them with fewer keys: uniform attention gives key j of S the weight
    sum_{i=j}^{S-1} 1 / (i + 1). With `relative`, attention is divided by that first, or the rank would say little but
    the position.
    """
    length = received_SB.shape[0]
    if relative:
        weights_S = 1.0 / torch.arange(1, length + 1, dtype=torch.float64, device=received_SB.device)
        uniform_S = weights_S.flip(0).cumsum(0).flip(0)
        received_SB = received_SB / uniform_S[:, None].to(received_SB.dtype)
    ranks_SB = received_SB.argsort(dim=0, stable=True).argsort(dim=0)
    return (ranks_SB.float() + 0.5) / length
