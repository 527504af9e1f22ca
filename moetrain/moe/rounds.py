"""How many rows go where in each round of an exchange.

Legend: N rounds, W expert ranks, L experts of one rank, E = W * L experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rounds:
    """One rank's part of every round; all ranks have the same number of rounds.

    Attributes:
        sent_NW: rows to send to each rank.
        received_NW: rows to receive from each rank; a round's sum to at most `max_rows`.
        arriving_NWL: int64 on the host, what is received, by source and local expert.
    """

    sent_NW: list[list[int]]
    received_NW: list[list[int]]
    arriving_NWL: Tensor

    def __len__(self) -> int:
        return len(self.sent_NW)

    def experts(self, number: int) -> range:
        """The local experts between the first and the last with rows in this round; empty without rows."""
        with_rows = self.arriving_NWL[number].sum(dim=0).nonzero().flatten().tolist()
        return range(with_rows[0], with_rows[-1] + 1) if with_rows else range(0)

    def is_cut(self, number: int) -> bool:
        """Whether the last expert of this round has further rows in the next."""
        experts = self.experts(number)
        return bool(experts) and number + 1 < len(self) and bool(self.arriving_NWL[number + 1, :, experts[-1]].any())


def plan_rounds(counts_WE: Tensor, rank: int, max_rows: int | None) -> Rounds:
    """Cut what arrives at each rank into rounds of `max_rows` rows (None: one round).

    A rank takes its rows in order of (local expert, source rank, position). So each source sends a contiguous slice of
    its expert-sorted rows in each round, and an expert's rows keep their order over the rounds.

    Args:
        counts_WE: int64 on the host, rows that each rank has for each expert: the same on every rank, which is why all
            of them find the same number of rounds without asking.
        rank: this rank.
    """
    ranks = counts_WE.shape[0]
    counts_WLW = counts_WE.view(ranks, ranks, -1).permute(1, 2, 0)  # destination, local expert, source
    end_WLW = counts_WLW.reshape(ranks, -1).cumsum(dim=1).view(counts_WLW.shape)
    most = int(end_WLW[:, -1, -1].max())
    size = max_rows or max(most, 1)
    first_N = torch.arange(0, max(most, 1), size)[:, None, None]

    def rows_in_rounds(count: Tensor, end: Tensor) -> Tensor:
        return (end.clamp(max=first_N + size) - (end - count).clamp(min=first_N)).clamp(min=0)

    sent_NWL = rows_in_rounds(counts_WLW[..., rank], end_WLW[..., rank])
    arriving_NLW = rows_in_rounds(counts_WLW[rank], end_WLW[rank])
    return Rounds(
        sent_NW=sent_NWL.sum(dim=2).tolist(),
        received_NW=arriving_NLW.sum(dim=1).tolist(),
        arriving_NWL=arriving_NLW.transpose(1, 2).contiguous(),
    )
