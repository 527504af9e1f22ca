"""A limit of the tokens that an expert takes of each sequence: the first ones, or the most probable ones.

Legend: S sequence positions of this rank, B sequences of the micro-batch, T = S * B, K slots per token, N choices.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def within_capacity(choices_TK: Tensor, capacity_N: Tensor, sequences: int, tensor_group: dist.ProcessGroup) -> Tensor:
    """The choices that find a place; -1 for those that come too late.

    Places are given in the order of positions, so a token's fate depends on earlier tokens alone. The limit is per
    sequence, so it depends neither on the micro-batch nor on the ranks (`expert_capacity` of Switch Transformers,
    arXiv 2101.03961, as Hugging Face implements it: a running count along each sequence).

    Args:
        choices_TK: int64, -1 in unused slots; a token's choices are distinct.
        capacity_N: int64.
        sequences: B.
        tensor_group: ranks that hold the other parts of the same sequences, in the order of their positions.

    Communication: one all-gather of [B, N] over `tensor_group` when it has more than one rank.
    """
    num_choices = capacity_N.numel()
    # Unused slots count into an extra column that is never read.
    chosen_TX = torch.zeros(choices_TK.shape[0], num_choices + 1, dtype=torch.int64, device=choices_TK.device)
    chosen_TX.scatter_(1, torch.where(choices_TK < 0, num_choices, choices_TK), 1)
    chosen_SBX = chosen_TX.view(-1, sequences, num_choices + 1)
    earlier_SBX = chosen_SBX.cumsum(dim=0) - chosen_SBX + _on_lower_ranks(chosen_SBX.sum(dim=0), tensor_group)
    earlier_TK = earlier_SBX.view(chosen_TX.shape).gather(1, choices_TK.clamp(min=0))
    return torch.where(earlier_TK < capacity_N[choices_TK.clamp(min=0)], choices_TK, -1)


def most_probable_within_capacity(
    choices_TK: Tensor, probs_TN: Tensor, capacity_N: Tensor, sequences: int, tensor_group: dist.ProcessGroup
) -> Tensor:
    """As `within_capacity`, but places are given in the order of the router's probability of the choice, from the
    highest on, and among equals in the order of positions (batch-prioritized routing of V-MoE, arXiv 2106.05974,
    section 4, along each sequence). A token's fate depends on later ones: for encoders.

    Communication: one all-gather of [S, B, N] fp32 over `tensor_group` when it has more than one rank.
    """
    used_TK = choices_TK >= 0
    # Unused slots write into an extra column that is never read.
    columns_TK = torch.where(used_TK, choices_TK, capacity_N.numel())
    score_TX = probs_TN.new_full((choices_TK.shape[0], capacity_N.numel() + 1), -torch.inf)
    chosen_TK = probs_TN.detach().gather(1, choices_TK.clamp(min=0))
    score_TX.scatter_(1, columns_TK, torch.where(used_TK, chosen_TK, -torch.inf))
    score_SBX = score_TX.view(-1, sequences, score_TX.shape[1])
    place_SBX = _whole(score_SBX, tensor_group).argsort(dim=0, descending=True, stable=True).argsort(dim=0)
    here = slice(tensor_group.rank() * len(score_SBX), (tensor_group.rank() + 1) * len(score_SBX))
    place_TK = place_SBX[here].reshape(score_TX.shape).gather(1, columns_TK)
    return torch.where(used_TK & (place_TK < capacity_N[choices_TK.clamp(min=0)]), choices_TK, -1)


def _whole(part_SBX: Tensor, tensor_group: dist.ProcessGroup) -> Tensor:
    """All positions of the sequences, of which each rank holds as many."""
    if tensor_group.size() == 1:
        return part_SBX
    everyone = [torch.empty_like(part_SBX) for _ in range(tensor_group.size())]
    dist.all_gather(everyone, part_SBX.contiguous(), group=tensor_group)
    return torch.cat(everyone)


def _on_lower_ranks(counts_BX: Tensor, tensor_group: dist.ProcessGroup) -> Tensor | int:
    """Sum of the counts of the ranks that hold earlier positions."""
    if tensor_group.size() == 1:
        return 0
    everyone_WBX = counts_BX.new_empty(tensor_group.size(), *counts_BX.shape)
    dist.all_gather(list(everyone_WBX.unbind()), counts_BX, group=tensor_group)
    return everyone_WBX[: tensor_group.rank()].sum(dim=0)
