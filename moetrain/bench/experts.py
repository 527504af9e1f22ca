"""Tokens, routing and expert weights of a point, the same for every contender.

Legend: T tokens, K expert slots a token, R routed rows, E experts, D hidden size, F expert width, C rows of the busiest
expert.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from moetrain import ops
from moetrain.bench.problem import NotHereError
from moetrain.bench.results import Point

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MOST_PADDING = 8  # times the rows; beyond that, padding is slower by as much and fills the memory


def expert_ids(tokens: int, top_k: int, experts: int, routing: str, device: str) -> Tensor:
    """int64 [T, K]. balanced: equal loads, in random order. zipf: the e-th expert is drawn with a weight of 1/e,
    without replacement. all_to_one: every slot of every token."""
    if routing == "all_to_one":
        return torch.zeros(tokens, top_k, dtype=torch.int64, device=device)
    if routing == "zipf":
        weights = 1.0 / torch.arange(1, experts + 1, device=device)
        return torch.multinomial(weights.expand(tokens, experts), top_k)
    assert routing == "balanced", routing
    places = torch.randperm(tokens, device=device)[:, None] * top_k + torch.arange(top_k, device=device)
    return places % experts


class Routed:
    """Which token goes where, with weights that sum to one for a token."""

    def __init__(self, point: Point) -> None:
        torch.manual_seed(0)
        self.point, self.experts, self.device = point, point.experts, point.device
        self.ids_TK = expert_ids(point.tokens, point.top_k, point.experts, point.routing, point.device)
        self.plan = ops.plan_permutation(self.ids_TK, point.experts)
        self.counts_E = self.plan.tokens_per_expert_E
        self.ends_E = self.counts_E.cumsum(0).to(torch.int32)
        self.token_R = self.plan.row_token_R
        self.weights_TK = torch.randn(point.tokens, point.top_k, device=point.device).softmax(dim=-1)

    @property
    def rows(self) -> int:
        """R."""
        return self.token_R.numel()

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers in the point's dtype."""
        dtype = TORCH_DTYPES[self.point.dtype]
        return torch.randn(*shape, dtype=dtype, device=self.device).mul_(scale)

    @cached_property
    def padded_rows(self) -> tuple[int, Tensor]:
        """(C, the row of a [E x C, ...] tensor that each routed row stands in).

        NotHereError when that would be mostly padding.
        """
        busiest, experts = int(self.counts_E.max()), self.experts
        if experts * busiest > MOST_PADDING * self.rows:
            raise NotHereError(
                f"would pad {self.rows} rows to {experts * busiest}, more than {MOST_PADDING} times as many"
            )
        expert_R = torch.repeat_interleave(torch.arange(experts, device=self.device), self.counts_E)
        first_E = self.counts_E.cumsum(0) - self.counts_E
        return busiest, expert_R * busiest + torch.arange(self.rows, device=self.device) - first_E[expert_R]

    def pad(self, rows_R: Tensor) -> Tensor:
        """[R, n] -> [E, C, n], zeros between."""
        busiest, place_R = self.padded_rows
        padded = rows_R.new_zeros(self.experts * busiest, rows_R.shape[1])
        return padded.index_copy(0, place_R, rows_R).view(self.experts, busiest, -1)

    def unpad(self, padded: Tensor) -> Tensor:
        """[E, C, n] -> [R, n]."""
        return padded.flatten(0, 1).index_select(0, self.padded_rows[1])


class Layer(Routed):
    """Routing, and an expert layer's tokens, weights and incoming gradient; all of them want gradients."""

    def __init__(self, point: Point) -> None:
        super().__init__(point)
        T, D, F, E = point.tokens, point.hidden, point.ffn, point.experts
        self.x_TD = self.random(T, D).requires_grad_()
        self.weights_TK.requires_grad_()
        self.fc1 = nn.Parameter(self.random(E, 2 * F, D, scale=D**-0.5))
        self.fc2 = nn.Parameter(self.random(E, D, F, scale=F**-0.5))
        self.grad_TD = self.random(T, D)

    def flops(self) -> float:
        """Of the forward products: fc1 with 2 F outputs, fc2 with D."""
        return 2.0 * self.rows * 3 * self.point.hidden * self.point.ffn
