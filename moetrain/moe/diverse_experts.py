"""Experts of different widths (MoDSE, arXiv 2409.12210).

Legend: T tokens, K expert slots a token, D hidden size, F width of one expert, H sum of the widths of this rank's
experts, R routed rows of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from moetrain.config.model import Activation
from moetrain.config.size import projections_in
from moetrain.moe.experts import run_experts
from moetrain.ops import PermutePlan, combine, permute, unpermute


class DiverseExperts(nn.Module):
    """As `GroupedExperts`, with one width per expert.

    The weights of all experts lie in one tensor each, expert after expert: `fc1` [2H, D] has an expert's gate rows,
    then its up rows (with ReLU [H, D], its rows); `fc2` [H, D] is transposed, so that it can be cut by experts as well.
    Every expert rank holds as many rows, hence checkpoints cut them like any other tensor. Experts of equal width that
    stand next to each other are one call of the operator; others one each.
    """

    def __init__(
        self, widths: Sequence[int], hidden_size: int, dtype: torch.dtype, activation: Activation = "swiglu"
    ) -> None:
        """`widths` of this rank's experts."""
        super().__init__()
        self.activation: Activation = activation
        self.runs = [(width, len(list(same))) for width, same in groupby(widths)]
        self.fc1 = nn.Parameter(torch.empty(projections_in(activation) * sum(widths), hidden_size, dtype=dtype))
        self.fc2 = nn.Parameter(torch.empty(sum(widths), hidden_size, dtype=dtype))

    def forward(self, x_TD: Tensor, weights_TK: Tensor | None, plan: PermutePlan) -> Tensor:
        """[T, D] -> [T, D], the weighted sum (None: the sum) of each token's experts. A token's result does not depend
        on the other tokens. Synchronises the host once, to learn how many rows each width has."""
        counts_L = plan.tokens_per_expert_E
        numbers_L = counts_L.tolist()
        rows_RD = permute(x_TD, plan)
        results, row, first = [], 0, 0
        for fc1_nFD, fc2_nDF in self._weights():
            stop = first + fc1_nFD.shape[0]
            rows = sum(numbers_L[first:stop])
            here = _sorted_already(rows, counts_L[first:stop])
            results.append(run_experts(rows_RD[row : row + rows], None, fc1_nFD, fc2_nDF, here, self.activation))
            row, first = row + rows, stop
        results_RD = torch.cat(results)
        return unpermute(results_RD, plan) if weights_TK is None else combine(results_RD, weights_TK, plan)

    def _weights(self) -> Iterator[tuple[Tensor, Tensor]]:
        """fc1 [n, 2F, D] (with ReLU [n, F, D]) and fc2 [n, D, F] of each run of n experts of equal width."""
        # Split, and not sliced: the gradients of slices would each be as large as the whole.
        n_in = projections_in(self.activation)
        fc1_runs = self.fc1.split([n_in * width * number for width, number in self.runs])
        fc2_runs = self.fc2.split([width * number for width, number in self.runs])
        for (width, number), fc1, fc2 in zip(self.runs, fc1_runs, fc2_runs, strict=True):
            fc2_nFD = fc2.unflatten(0, (number, width))
            yield fc1.unflatten(0, (number, n_in * width)), fc2_nFD.transpose(1, 2).contiguous()


def _sorted_already(rows: int, counts_L: Tensor) -> PermutePlan:
    """The plan of rows that stand in the order of their experts, one row a token."""
    order_R = torch.arange(rows, device=counts_L.device)
    return PermutePlan(order_R, order_R, order_R[:, None], counts_L)
