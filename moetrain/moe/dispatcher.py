"""Bring each routed row to the rank of its expert, and its result home.

Legend: T tokens, K slots per token, R routed rows of this rank, M rows that arrive here, D hidden size, W expert ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.ops import PermutePlan, all_to_all, combine, gather_rows, permute, plan_permutation, reorder_by_expert


@dataclass(frozen=True)
class DispatchHandle:
    """What `combine` needs to undo a `dispatch`. Exchange fields are None where one rank holds every expert."""

    plan: PermutePlan
    tokens_per_local_expert: Tensor
    sent: list[int] | None
    received: list[int] | None
    to_arrival_order: Tensor | None


class TokenDispatcher:
    """Dropless dispatch of variable-length routing over the expert ranks.

    Rows are sorted by global expert, so the rows for one rank are one contiguous slice and the exchange is a single
    uneven all-to-all. Every rank takes part in every exchange, also with nothing to send.
    """

    def __init__(self, num_experts: int, expert_group: dist.ProcessGroup) -> None:
        self.num_experts = num_experts
        self.group = expert_group

    def dispatch(self, x_TD: Tensor, expert_ids_TK: Tensor) -> tuple[Tensor, DispatchHandle]:
        """Rows [M, D], sorted by local expert, and the handle for `combine`.

        Communication: with W > 1 one all-to-all of E int64 counts and one of the rows, over the expert group.
        Synchronises the host once, to learn the split sizes.
        """
        plan = plan_permutation(expert_ids_TK, self.num_experts)
        rows_RD = permute(x_TD, plan)
        if self.group.size() == 1:
            return rows_RD, DispatchHandle(plan, plan.tokens_per_expert_E, None, None, None)
        counts_to_WE = plan.tokens_per_expert_E.view(self.group.size(), -1)
        counts_from_WE = torch.empty_like(counts_to_WE)
        dist.all_to_all_single(counts_from_WE, counts_to_WE.contiguous(), group=self.group)
        sent = counts_to_WE.sum(dim=1).tolist()
        received = counts_from_WE.sum(dim=1).tolist()
        arrived_MD = all_to_all(rows_RD, received, sent, self.group)
        order_M, inverse_M, tokens_per_expert = reorder_by_expert(counts_from_WE)
        handle = DispatchHandle(plan, tokens_per_expert, sent, received, inverse_M)
        return gather_rows(arrived_MD, order_M), handle

    def combine(self, rows_MD: Tensor, weights_TK: Tensor, handle: DispatchHandle) -> Tensor:
        """Weighted sum of each token's expert outputs, [T, D]; the inverse journey of `dispatch`."""
        if handle.sent is not None:
            assert handle.received is not None and handle.to_arrival_order is not None
            rows_MD = gather_rows(rows_MD, handle.to_arrival_order)
            rows_MD = all_to_all(rows_MD, handle.sent, handle.received, self.group)
        return combine(rows_MD, weights_TK, handle.plan)
