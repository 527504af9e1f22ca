"""Auxiliary losses of a router. Both are per sequence, so no layout and no micro-batch size changes their value.

Legend: S local sequence positions, B sequences of the micro-batch, E experts.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def load_balance_loss(
    probs_SBE: Tensor, selected_SBE: Tensor, sequence_length: int | Tensor, tensor_group: dist.ProcessGroup
) -> Tensor:
    """E * sum_e f_e P_e per sequence, averaged over the B sequences (Switch, arXiv 2101.03961 eq. 4-6).

    f_e is the share of the sequence's (token, expert) assignments that went to expert e, so that it stays right when
    tokens have different numbers of experts; P_e is the mean router probability. f has no gradient.

    Args:
        probs_SBE: fp32 router probabilities of this rank's part of each sequence; zeros for padding.
        selected_SBE: 0/1, the assignments; padding has none.
        sequence_length: tokens of a whole sequence, over all tensor ranks; of padded sequences, [B] of real ones, at
            least 1.
        tensor_group: ranks that hold the other parts of the same sequences.

    Returns:
        This rank's part of the loss, a scalar: the parts sum to the loss over `tensor_group`.

    Communication: one all-reduce of [B, E] over `tensor_group` when it has more than one rank.
    """
    counts_BE = selected_SBE.sum(dim=0).to(torch.float32)
    if tensor_group.size() > 1:
        dist.all_reduce(counts_BE, group=tensor_group)
    share_BE = counts_BE / counts_BE.sum(dim=-1, keepdim=True).clamp(min=1.0)
    mean_prob_BE = _mean_over_tokens(probs_SBE, sequence_length)
    num_experts = probs_SBE.shape[-1]
    return num_experts * (share_BE * mean_prob_BE).sum(dim=-1).mean()


def router_z_loss(logits_SBE: Tensor, sequence_length: int | Tensor, valid_SB: Tensor | None = None) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906 eq. 5): this rank's part, as above.
    `valid_SB` leaves out padding."""
    square_SB = logits_SBE.logsumexp(dim=-1).square()
    if valid_SB is not None:
        square_SB = square_SB.masked_fill(~valid_SB, 0.0)
    return _mean_over_tokens(square_SB[..., None], sequence_length).mean()


def _mean_over_tokens(values_SBE: Tensor, sequence_length: int | Tensor) -> Tensor:
    """This rank's part of the mean over each sequence, [B, E]."""
    length = sequence_length[:, None] if isinstance(sequence_length, Tensor) else sequence_length
    return values_SBE.sum(dim=0) / length
