"""Grouped products: ours, torch's F.grouped_mm, and torch.bmm over experts padded to the busiest one.

The padded operands are made outside the time, which favors bmm: in a layer somebody has to fill them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain import ops
from moetrain.bench.experts import Routed
from moetrain.bench.problem import Contender, Problem, attempt
from moetrain.bench.results import Point

_ours = torch.ops.moetrain


class _Product(Routed):
    """x [R, D] sorted by expert, w [E, F, D], and the gradient [R, F] of the product."""

    def __init__(self, point: Point) -> None:
        super().__init__(point)
        D, width = point.hidden, point.ffn
        self.x_TD = self.random(point.tokens, D)
        self.x_RD = self.x_TD.index_select(0, self.token_R)
        self.w_EFD = self.random(point.experts, width, D, scale=D**-0.5)
        self.grad_RF = self.random(self.rows, width)

    def flops(self) -> float:
        """The three products of a linear layer take the same number of operations."""
        return 2.0 * self.rows * self.point.hidden * self.point.ffn


def fprop(point: Point) -> Problem:
    """x w.T"""
    p = _Product(point)

    def padded() -> Contender:
        x_ECD, w_EDF = p.pad(p.x_RD), p.w_EFD.transpose(1, 2)
        return Contender(lambda: torch.bmm(x_ECD, w_EDF), lambda y: {"y": p.unpad(y)})

    return Problem(
        Contender(lambda: ops.grouped_gemm(p.x_RD, p.w_EFD, p.counts_E)),
        {
            "F.grouped_mm": Contender(lambda: F.grouped_mm(p.x_RD, p.w_EFD.transpose(1, 2), offs=p.ends_E)),
            "padded bmm": attempt(padded),
        },
        p.flops(),
    )


def gathered_fprop(point: Point) -> Problem:
    """x[token of each row] w.T"""
    p = _Product(point)

    def gather_then_multiply() -> Tensor:
        return F.grouped_mm(p.x_TD.index_select(0, p.token_R), p.w_EFD.transpose(1, 2), offs=p.ends_E)

    return Problem(
        Contender(lambda: ops.gathered_grouped_gemm(p.x_TD, p.w_EFD, p.token_R, p.counts_E)),
        {"index_select + F.grouped_mm": Contender(gather_then_multiply)},
        p.flops(),
    )


def dgrad(point: Point) -> Problem:
    """grad w"""
    p = _Product(point)

    def padded() -> Contender:
        grad_ECF = p.pad(p.grad_RF)
        return Contender(lambda: torch.bmm(grad_ECF, p.w_EFD), lambda y: {"y": p.unpad(y)})

    return Problem(
        Contender(lambda: _ours.grouped_gemm_dgrad(p.grad_RF, p.w_EFD, p.counts_E)),
        {
            "F.grouped_mm": Contender(lambda: F.grouped_mm(p.grad_RF, p.w_EFD, offs=p.ends_E)),
            "padded bmm": attempt(padded),
        },
        p.flops(),
    )


def wgrad(point: Point) -> Problem:
    """grad.T x of each expert"""
    p = _Product(point)
    return _wgrad(p, Contender(lambda: _ours.grouped_gemm_wgrad(p.grad_RF, p.x_RD, p.counts_E)))


def wgrad_out(point: Point) -> Problem:
    """The same, into memory that is kept from step to step."""
    p = _Product(point)
    kept_EFD = torch.zeros_like(p.w_EFD)

    def ours() -> Tensor:
        ops.grouped_gemm_wgrad_out(p.grad_RF, p.x_RD, p.counts_E, kept_EFD, False)
        return kept_EFD

    return _wgrad(p, Contender(ours))


def _wgrad(p: _Product, ours: Contender) -> Problem:
    def padded() -> Contender:
        grad_EFC, x_ECD = p.pad(p.grad_RF).transpose(1, 2), p.pad(p.x_RD)
        return Contender(lambda: torch.bmm(grad_EFC, x_ECD))

    return Problem(
        ours,
        {
            "F.grouped_mm": Contender(lambda: F.grouped_mm(p.grad_RF.t(), p.x_RD, offs=p.ends_E)),
            "padded bmm": attempt(padded),
        },
        p.flops(),
    )
