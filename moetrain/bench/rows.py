"""Moving rows: the plan against sorting, gather against index_select, weighted sum against index_add."""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain import ops
from moetrain.bench.experts import Routed
from moetrain.bench.problem import Contender, Problem
from moetrain.bench.results import Point

_INT64 = 8


def plan(point: Point) -> Problem:
    """A stable sort, a count and an inverse; ours gives all three in one pass."""
    p = Routed(point)

    def sort() -> tuple[Tensor, ...]:
        slots = p.ids_TK.reshape(-1)
        order_R = slots.argsort(stable=True)
        counts_E = torch.bincount(slots, minlength=p.experts)
        row_of_slot = torch.empty_like(order_R)
        row_of_slot[order_R] = torch.arange(order_R.numel(), device=order_R.device)
        return order_R // point.top_k, order_R, row_of_slot.view_as(p.ids_TK), counts_E

    def named(result: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return dict(zip(("row_token", "row_slot", "slot_row", "tokens_per_expert"), result, strict=True))

    return Problem(
        Contender(lambda: ops.plan_permutation(p.ids_TK, p.experts), named),
        {"argsort, bincount, scatter": Contender(sort, named)},
        work=4.0 * _INT64 * p.rows,
        unit="B",
    )


def permute(point: Point) -> Problem:
    """Without gradients."""
    p = Routed(point)
    x_TD = p.random(point.tokens, point.hidden)
    return Problem(
        Contender(lambda: ops.permute(x_TD, p.plan)),
        {"index_select": Contender(lambda: x_TD.index_select(0, p.token_R))},
        work=2.0 * p.rows * point.hidden * x_TD.element_size(),
        unit="B",
    )


def combine(point: Point) -> Problem:
    """Both add in float32."""
    p = Routed(point)
    rows_RD = p.random(p.rows, point.hidden)

    def index_add() -> Tensor:
        weights_R = p.weights_TK.reshape(-1).index_select(0, p.plan.row_slot_R)
        y_TD = torch.zeros(point.tokens, point.hidden, device=p.device)
        return y_TD.index_add_(0, p.token_R, (rows_RD * weights_R[:, None]).float()).to(rows_RD.dtype)

    return Problem(
        Contender(lambda: ops.combine(rows_RD, p.weights_TK, p.plan)),
        {"index_add": Contender(index_add)},
        work=float((p.rows + point.tokens) * point.hidden * rows_RD.element_size()),
        unit="B",
    )
