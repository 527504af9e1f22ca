"""Attention that also tells how important each token is, against attention alone and against the whole matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain import ops
from moetrain.bench.experts import TORCH_DTYPES
from moetrain.bench.problem import Contender, NotHereError, Problem
from moetrain.bench.results import Point

_OPERATOR = "attention_with_importance"


class _Attention:
    """Queries, keys and values of one sequence, both in the operator's layout [S, B, H, d] and in torch's [B, H, S, d]:
    each side gets the one that it likes best."""

    def __init__(self, point: Point) -> None:
        torch.manual_seed(0)
        self.point, self.scale = point, point.hidden**-0.5
        self.operator = getattr(ops, _OPERATOR, None)
        if self.operator is None:
            raise NotHereError(f"this build of moetrain.ops has no {_OPERATOR}")
        shape = (point.tokens, 1, point.heads, point.hidden)
        dtype = TORCH_DTYPES[point.dtype]
        self.qkv_SBHd = [torch.randn(shape, dtype=dtype, device=point.device) for _ in range(3)]
        self.qkv_BHSd = [t.permute(1, 2, 0, 3).contiguous() for t in self.qkv_SBHd]

    def ours(self) -> Contender:
        """Context and importance."""
        operator, point = self.operator, self.point
        assert operator is not None

        def call() -> tuple[Tensor, Tensor]:
            return operator(*self.qkv_SBHd, point.measure, point.causal, self.scale)

        return Contender(call, lambda both: {"context": both[0], "importance": both[1]})

    def flops(self) -> float:
        """Two products of every query with every key that it sees."""
        seen = 0.5 if self.point.causal else 1.0
        return 4.0 * seen * self.point.tokens**2 * self.point.heads * self.point.hidden


def row_measure(point: Point) -> Problem:
    """The baseline gives no importance: only the context is compared."""
    p = _Attention(point)

    def attention() -> Tensor:
        q, k, v = p.qkv_BHSd
        return F.scaled_dot_product_attention(q, k, v, is_causal=point.causal, scale=p.scale)

    baseline = Contender(attention, lambda context: {"context": context.permute(2, 0, 1, 3)})
    return Problem(p.ours(), {"attention alone": baseline}, p.flops())


def column_measure(point: Point) -> Problem:
    """The baseline forms all probabilities, multiplies them with the values and reduces their columns."""
    p = _Attention(point)
    assert not point.causal, point

    def whole_matrix() -> tuple[Tensor, Tensor]:
        q, k, v = p.qkv_BHSd
        p_BHSS = torch.softmax(q @ k.transpose(-1, -2) * p.scale, dim=-1)
        columns_BHS = p_BHSS.sum(dim=-2) if point.measure == "col_sum" else p_BHSS.amax(dim=-2)
        return p_BHSS @ v, columns_BHS.float().sum(dim=1).t()

    def named(both: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"context": both[0].permute(2, 0, 1, 3), "importance": both[1]}

    return Problem(p.ours(), {"whole matrix": Contender(whole_matrix, named)}, p.flops())
