"""Bring each routed row to the rank of its expert, and its result home.

Legend: T tokens, K slots per token, R routed rows of this rank, M rows that arrive here, D hidden size, W expert ranks,
E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.config.moe import DispatchConfig
from moetrain.moe.diverse_experts import DiverseExperts
from moetrain.moe.experts import GroupedExperts
from moetrain.moe.round_trips import RoundTrips, Route, arrival_plan, by_rounds
from moetrain.moe.rounds import Rounds, plan_rounds
from moetrain.ops import PendingRows, PermutePlan, all_to_all, combine, permute, plan_permutation, start_all_to_all

_NO_ROUNDS = Rounds([], [], torch.empty(0, 0, 0, dtype=torch.int64))


@dataclass(frozen=True)
class Dispatch:
    """Tokens whose rows are on their way: what `TokenDispatcher.finish` needs of `start`.

    Attributes:
        x_TD: the tokens.
        plan: their rows, by expert; in several rounds, by round first.
        rounds: who sends how much to whom; of no use with padding.
        first: the rows that come to this rank's experts, in the first round. None if they have not been sent, or have
            nowhere to go (one rank, one round).
        padding: where the rows lie in buffers of a fixed size, which are exchanged in their place, or None.
    """

    x_TD: Tensor
    plan: PermutePlan
    rounds: Rounds
    first: PendingRows | None = None
    padding: Padding | None = None


@dataclass(frozen=True)
class Padding:
    """Every rank sends each expert the same number of rows, the missing ones as zeros.

    Attributes:
        rows_per_expert: of one rank.
        place_R: row of the buffer of each row of the plan.
        splits_W: rows that each rank sends to, and gets from, each other rank.
    """

    rows_per_expert: int
    place_R: Tensor
    splits_W: list[int]

    @staticmethod
    def of(plan: PermutePlan, rows_per_expert: int, ranks: int) -> Padding:
        """For rows that need no more than `rows_per_expert` each."""
        counts_E = plan.tokens_per_expert_E
        rows, num_experts = plan.row_token_R.numel(), counts_E.numel()
        shift_E = torch.arange(num_experts, device=counts_E.device) * rows_per_expert - (counts_E.cumsum(0) - counts_E)
        place_R = torch.arange(rows, device=counts_E.device)
        place_R += torch.repeat_interleave(shift_E, counts_E, output_size=rows)
        return Padding(rows_per_expert, place_R, [num_experts // ranks * rows_per_expert] * ranks)

    def fill(self, rows_RD: Tensor) -> Tensor:
        """The buffer for all experts."""
        return rows_RD.new_zeros(sum(self.splits_W), rows_RD.shape[1]).index_copy(0, self.place_R, rows_RD)

    def arrivals(self) -> PermutePlan:
        """How the buffers of all ranks are read at the experts."""
        local_experts = self.splits_W[0] // max(self.rows_per_expert, 1)
        counts_WL = torch.full((len(self.splits_W), local_experts), self.rows_per_expert)
        return arrival_plan(counts_WL.to(self.place_R.device))


class TokenDispatcher:
    """Dropless dispatch of variable-length routing over the expert ranks.

    Rows are sorted by global expert, so the rows for one rank are one contiguous slice and the exchange is a single
    uneven all-to-all; where some rank would get more than `max_rows` rows, one for each round of that many. Every rank
    takes part in every exchange, also with nothing to send.
    """

    def __init__(self, num_experts: int, expert_group: dist.ProcessGroup, config: DispatchConfig) -> None:
        self.num_experts = num_experts
        self.group = expert_group
        self.max_rows = config.max_rows
        # One rank has no journeys to work through, and would only hold rows of two rounds at a time.
        self.overlap = config.overlap and expert_group.size() > 1

    def start(self, x_TD: Tensor, expert_ids_TK: Tensor, rows_per_expert: int | None = None) -> Dispatch:
        """Sends the rows (of the first round). With `overlap` they travel while the caller does other work.

        With `rows_per_expert`, which no expert's rows may exceed, buffers of that size travel.

        Communication: with W > 1 one all-gather of E int64 counts and one all-to-all of rows, over the expert group.
        Synchronises the host once, to learn the split sizes. With `rows_per_expert` no counts are gathered.
        """
        plan = plan_permutation(expert_ids_TK, self.num_experts)
        if rows_per_expert is not None:
            return self._start_padded(x_TD, plan, rows_per_expert)
        rounds = plan_rounds(self._counts(plan.tokens_per_expert_E), self.group.rank(), self.max_rows)
        if len(rounds) > 1:
            plan = by_rounds(plan, rounds)
            route = self._route(plan, rounds)
            first = route.leave(0, [route.tokens(x_TD, 0)])[0] if self.overlap else None
            return Dispatch(x_TD, plan, rounds, first)
        if self.group.size() == 1:
            return Dispatch(x_TD, plan, rounds)
        splits = rounds.received_NW[0], rounds.sent_NW[0]
        rows_RD = permute(x_TD, plan)
        if self.overlap:
            return Dispatch(x_TD, plan, rounds, start_all_to_all(rows_RD, *splits, self.group))
        return Dispatch(x_TD, plan, rounds, PendingRows.arrived(all_to_all(rows_RD, *splits, self.group)))

    def finish(self, dispatch: Dispatch, weights_TK: Tensor, experts: GroupedExperts | DiverseExperts) -> Tensor:
        """Weighted sum of each token's expert outputs, [T, D].

        Communication: with W > 1 one all-to-all of rows, and for each further round two; in the backward as many, with
        several rounds five each.
        """
        plan, rounds, first = dispatch.plan, dispatch.rounds, dispatch.first
        if len(rounds) > 1:
            assert isinstance(experts, GroupedExperts)  # the settings see to it
            route = self._route(plan, rounds)
            return RoundTrips.apply(dispatch.x_TD, weights_TK, experts.fc1, experts.fc2, route, first)
        if first is None:
            return experts(dispatch.x_TD, weights_TK, plan)
        if dispatch.padding is not None:
            padding = dispatch.padding
            results_MD = experts(first.wait(), None, padding.arrivals())
            home_XD = all_to_all(results_MD, padding.splits_W, padding.splits_W, self.group)
            return combine(home_XD.index_select(0, padding.place_R), weights_TK, plan)
        arrivals = arrival_plan(rounds.arriving_NWL[0].to(weights_TK.device))
        # No name for the arrived rows: they are free when the experts are done with them.
        results_MD = experts(first.wait(), None, arrivals)
        home_RD = all_to_all(results_MD, rounds.sent_NW[0], rounds.received_NW[0], self.group)
        return combine(home_RD, weights_TK, plan)

    def _start_padded(self, x_TD: Tensor, plan: PermutePlan, rows_per_expert: int) -> Dispatch:
        padding = Padding.of(plan, rows_per_expert, self.group.size())
        buffer_XD = padding.fill(permute(x_TD, plan))
        exchange = (buffer_XD, padding.splits_W, padding.splits_W, self.group)
        first = start_all_to_all(*exchange) if self.overlap else PendingRows.arrived(all_to_all(*exchange))
        return Dispatch(x_TD, plan, _NO_ROUNDS, first, padding)

    def _route(self, plan: PermutePlan, rounds: Rounds) -> Route:
        return Route(plan, rounds, self.group, self.overlap)

    def _counts(self, tokens_per_expert_E: Tensor) -> Tensor:
        """Rows of every rank for every expert, int64 [W, E] on the host."""
        everyone_WE = tokens_per_expert_E.new_empty(self.group.size(), self.num_experts)
        dist.all_gather(list(everyone_WE.unbind()), tokens_per_expert_E, group=self.group)
        return everyone_WE.cpu()
