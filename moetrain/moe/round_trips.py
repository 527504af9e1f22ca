"""Experts whose rows come in rounds, so that memory has a ceiling whatever the router does.

In each round every rank gets at most `max_rows` rows, computes them and sends the results home. Nothing of a round is
kept for the backward: it sends the rows again, together with their gradients, and recomputes.

Legend: T tokens, K slots per token, R routed rows of this rank, M rows that arrive in a round, D hidden size, W expert
ranks, L experts of one rank, N rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moetrain.moe.rounds import Rounds
from moetrain.ops import (
    PendingRows,
    PermutePlan,
    combine,
    expert_layer,
    reorder_by_expert,
    start_all_to_all,
    unpermute,
)


def by_rounds(plan: PermutePlan, rounds: Rounds) -> PermutePlan:
    """The same plan with its rows in order of (round, destination, expert, slot): what travels together lies together,
    on its way out and on its way home."""
    device = plan.row_token_R.device
    sent_WN = torch.tensor(rounds.sent_NW, dtype=torch.int64, device=device).t()
    index_R, inverse_R, _ = reorder_by_expert(sent_WN)
    slot_row_TK = plan.slot_row_TK.clone()
    slot_row_TK.view(-1)[plan.row_slot_R] = inverse_R
    return PermutePlan(plan.row_token_R[index_R], plan.row_slot_R[index_R], slot_row_TK, plan.tokens_per_expert_E)


def arrival_plan(counts_WL: Tensor) -> PermutePlan:
    """One row, one token: how rows that arrived in (source, expert) order are read, and written, by expert."""
    order_M, inverse_M, tokens_per_expert_L = reorder_by_expert(counts_WL)
    return PermutePlan(order_M, order_M, inverse_M[:, None], tokens_per_expert_L)


@dataclass(frozen=True)
class Route:
    """The way of one layer's rows. `plan` is that of `by_rounds`."""

    plan: PermutePlan
    rounds: Rounds
    group: dist.ProcessGroup
    overlap: bool

    def travelers(self, number: int) -> slice:
        """This rank's rows that leave in the round."""
        first_N = [0, *accumulate(map(sum, self.rounds.sent_NW))]
        return slice(first_N[number], first_N[number + 1])

    def tokens(self, x_TD: Tensor, number: int) -> Tensor:
        """The rows of `x_TD` that leave in the round."""
        return x_TD.detach().index_select(0, self.plan.row_token_R[self.travelers(number)])

    def arrivals(self, number: int) -> PermutePlan:
        """The plan of the rows that arrive in the round, for the experts that have any."""
        here = self.rounds.experts(number)
        counts_WL = self.rounds.arriving_NWL[number, :, here.start : here.stop]
        return arrival_plan(counts_WL.to(self.plan.row_token_R.device))

    def leave(self, number: int, rows: list[Tensor]) -> list[PendingRows]:
        """Start for the experts' ranks with tensors that have one row per traveler, and are used up by this."""
        received_W, sent_W = self.rounds.received_NW[number], self.rounds.sent_NW[number]
        return [_used_up(r, start_all_to_all(r, received_W, sent_W, self.group)) for r in rows]

    def go_home(self, number: int, results: list[Tensor], homes: list[Tensor]) -> list[PendingRows]:
        """Start with results for each arrived row, which are used up; they will lie in this round's part of `homes`."""
        received_W, sent_W = self.rounds.received_NW[number], self.rounds.sent_NW[number]
        places = [home[self.travelers(number)] for home in homes]
        pairs = zip(results, places, strict=True)
        return [_used_up(r, start_all_to_all(r, sent_W, received_W, self.group, place)) for r, place in pairs]

    def travel(
        self,
        outward: Callable[[int], list[Tensor]],
        at_experts: Callable[[int, list[Tensor]], list[Tensor]],
        homes: list[Tensor],
        coming: list[PendingRows] | None = None,
    ) -> None:
        """All rounds: what `outward` gives goes to the experts, what `at_experts` makes of it comes home.

        With `overlap`, the rows of the next round and the results of the last one travel while a round is computed.
        The numbers are the same either way.
        """
        going: list[PendingRows] = []
        for number in range(len(self.rounds)):
            arrived = _arrive(coming or self.leave(number, outward(number)))
            more = self.overlap and number + 1 < len(self.rounds)
            coming = self.leave(number + 1, outward(number + 1)) if more else None
            results = at_experts(number, arrived)
            _arrive(going)
            going = self.go_home(number, results, homes)
            del arrived, results  # or they would live on beside those of the next round
            if not self.overlap:
                _arrive(going)
                going = []
        _arrive(going)


def _arrive(pending: list[PendingRows]) -> list[Tensor]:
    return [rows.wait() for rows in pending]


def _used_up(sent: Tensor, pending: PendingRows) -> PendingRows:
    """Frees what was sent at the moment that it has been sent.

    Dropping it is not enough: a worker thread of gloo lets go of its tensors a while after it has said that it is done,
    and until then they would come on top of the ceiling.
    """

    def arrive() -> Tensor:
        rows = pending.wait()
        if rows.data_ptr() != sent.data_ptr():  # in a group of one they are the same memory
            sent.untyped_storage().resize_(0)
        return rows

    return PendingRows(arrive)


class RoundTrips(torch.autograd.Function):
    """Weighted sum of each token's expert outputs, computed in the rounds of a `Route`."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weights_TK: Tensor,
        fc1_LFD: Tensor,
        fc2_LDF: Tensor,
        route: Route,
        first: PendingRows | None,
    ) -> Tensor:
        """`first`: the rows of round 0, if they have left already."""
        ctx.save_for_backward(x_TD, weights_TK, fc1_LFD, fc2_LDF)
        ctx.route = route
        home_RD = x_TD.new_empty(route.plan.row_token_R.numel(), x_TD.shape[1])

        def at_experts(number: int, arrived: list[Tensor]) -> list[Tensor]:
            here = route.rounds.experts(number)
            if not here:
                return arrived
            own = slice(here.start, here.stop)
            return [expert_layer(arrived[0], None, fc1_LFD[own], fc2_LDF[own], route.arrivals(number))]

        coming = None if first is None else [first]
        route.travel(lambda number: [route.tokens(x_TD, number)], at_experts, [home_RD], coming)
        return combine(home_RD, weights_TK, route.plan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_TK, fc1_LFD, fc2_LDF = ctx.saved_tensors
        route: Route = ctx.route
        plan = route.plan
        num_rows = plan.row_slot_R.numel()
        home_RD, home_R1 = x_TD.new_empty(num_rows, x_TD.shape[1]), weights_TK.new_empty(num_rows, 1)
        grad_fc1, grad_fc2 = _WeightGradient(fc1_LFD), _WeightGradient(fc2_LDF)

        def outward(number: int) -> list[Tensor]:
            weights_R1 = weights_TK.detach().reshape(-1, 1).index_select(0, plan.row_slot_R[route.travelers(number)])
            return [route.tokens(x_TD, number), route.tokens(grad_TD, number), weights_R1]

        def at_experts(number: int, arrived: list[Tensor]) -> list[Tensor]:
            here = route.rounds.experts(number)
            rows_MD, grad_MD, weights_M1 = arrived
            if not here:
                return [rows_MD, weights_M1]
            own = slice(here.start, here.stop)
            inputs = [t.detach().requires_grad_() for t in (rows_MD, weights_M1, fc1_LFD[own], fc2_LDF[own])]
            with torch.enable_grad():
                results_MD = expert_layer(inputs[0], inputs[1], inputs[2], inputs[3], route.arrivals(number))
            dx_MD, dweights_M1, dfc1, dfc2 = torch.autograd.grad(results_MD, inputs, grad_MD)
            is_cut = route.rounds.is_cut(number)
            grad_fc1.add(here, dfc1, is_cut)
            grad_fc2.add(here, dfc2, is_cut)
            return [dx_MD, dweights_M1]

        route.travel(outward, at_experts, [home_RD, home_R1])
        dweights = torch.zeros(weights_TK.numel(), 1, dtype=weights_TK.dtype, device=weights_TK.device)
        dweights.index_copy_(0, plan.row_slot_R, home_R1)
        return (
            unpermute(home_RD, plan),
            dweights.view(weights_TK.shape),
            grad_fc1.total,
            grad_fc2.total,
            None,
            None,
        )


class _WeightGradient:
    """Adds up the gradients of stacked weights over rounds whose experts ascend.

    At most one expert is unfinished at a time: the one whose rows the end of a round has cut. Its sum is kept in
    float32, so that its error does not grow with the number of rounds, at the price of one expert's size and not of
    all. An expert whose rows came in one round gets exactly the gradient of that round.
    """

    def __init__(self, weight: Tensor) -> None:
        self.total = torch.zeros_like(weight)
        self._unfinished = torch.zeros(weight.shape[1:], dtype=torch.float32, device=weight.device)

    def add(self, experts: range, gradients: Tensor, is_cut: bool) -> None:
        """`gradients[i]` belongs to `experts[i]`; `is_cut`: the next round goes on with the last of them."""
        first, stop = experts.start, experts.stop
        self._unfinished += gradients[0]
        if is_cut and len(experts) == 1:
            return
        self.total[first] = self._unfinished
        self.total[first + 1 : stop] = gradients[1:]
        self._unfinished.zero_()
        if is_cut:  # the total of this expert is overwritten when it is finished
            self._unfinished += gradients[-1]
