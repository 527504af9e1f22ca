"""One matrix product per expert over rows sorted by expert, in one call.

Legend: R routed rows, E experts, K in, N out (``nn.Linear``'s ``[out, in]``). No function here communicates.

**Row invariance.** The bits of an output row, and of a row of the input gradient, depend on that row and the
weights only: not on how many rows its expert has, on where it stands, or on the number of threads. Library
products do not promise this (they choose a kernel by shape), and the proof that no token sees the future
needs it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.ops import library as _library  # noqa: F401  (registers the operators)

_ops = torch.ops.moetrain


def grouped_gemm(x_RK: Tensor, w_ENK: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
    """Rows of expert ``e`` times ``w_ENK[e].T``: ``[R, N]`` in the dtype of ``x_RK``.

    Args:
        x_RK: float32 or bfloat16 (float32 accumulation), rows sorted by expert.
        w_ENK: same dtype.
        tokens_per_expert_E: int64, rows of each expert; sums to R. CUDA does not check the sum (that would
            wait for the device): there, rows beyond it give zeros.

    Differentiable in ``x_RK`` and ``w_ENK``; the weight gradient of an expert without rows is exactly zero.
    The weight gradient adds rows in order, so it is the same for any number of threads.

    Raises:
        ValueError: shapes, dtypes or devices disagree.
    """
    return _ops.grouped_gemm(x_RK, w_ENK, tokens_per_expert_E)


def gathered_grouped_gemm(x_TK: Tensor, w_ENK: Tensor, row_source_R: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
    """``grouped_gemm(x_TK[row_source_R], ...)`` without the copy of the rows, to the bit. Not differentiable.

    Args:
        row_source_R: int64, the row of ``x_TK`` that row r is made from; sorted by expert of r. CUDA does not
            check its range.

    Raises:
        ValueError: shapes, dtypes or devices disagree, or a row is not there.
    """
    return _ops.gathered_grouped_gemm(x_TK, w_ENK, row_source_R, tokens_per_expert_E)


def grouped_gemm_wgrad_out(
    grad_RN: Tensor, x_RK: Tensor, tokens_per_expert_E: Tensor, out_ENK: Tensor, accumulate: bool
) -> None:
    """Weight gradient of :func:`grouped_gemm` written, or added in one rounding, into a kept buffer.

    Args:
        out_ENK: contiguous; dtype of the rows, or float32, which takes the float32 sums as they are.
        accumulate: add to what is there. Without it ``out_ENK`` is overwritten and never read.

    Raises:
        ValueError: shapes, dtypes or devices disagree.
    """
    _ops.grouped_gemm_wgrad_out(grad_RN, x_RK, tokens_per_expert_E, out_ENK, accumulate)


def row_invariant_linear(x_RK: Tensor, w_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """``F.linear`` with the row invariance of :func:`grouped_gemm`: ``[..., K]`` -> ``[..., N]``."""
    rows = x_RK.reshape(-1, x_RK.size(-1))
    all_rows = torch.full((1,), rows.size(0), dtype=torch.int64, device=x_RK.device)
    y = _ops.grouped_gemm(rows, w_NK.unsqueeze(0), all_rows).view(*x_RK.shape[:-1], w_NK.size(0))
    return y if bias_N is None else y + bias_N


@torch.library.register_fake("moetrain::grouped_gemm")
def _fprop_fake(x: Tensor, w: Tensor, tokens_per_expert: Tensor) -> Tensor:
    return x.new_empty(x.size(0), w.size(1))


@torch.library.register_fake("moetrain::grouped_gemm_dgrad")
def _dgrad_fake(grad: Tensor, w: Tensor, tokens_per_expert: Tensor) -> Tensor:
    return grad.new_empty(grad.size(0), w.size(2))


@torch.library.register_fake("moetrain::grouped_gemm_wgrad")
def _wgrad_fake(grad: Tensor, x: Tensor, tokens_per_expert: Tensor) -> Tensor:
    return grad.new_empty(tokens_per_expert.size(0), grad.size(1), x.size(1))


@torch.library.register_fake("moetrain::gathered_grouped_gemm")
def _gathered_fake(x: Tensor, w: Tensor, row_source: Tensor, tokens_per_expert: Tensor) -> Tensor:
    return x.new_empty(row_source.size(0), w.size(1))


@torch.library.register_fake("moetrain::grouped_gemm_wgrad_out")
def _wgrad_out_fake(grad: Tensor, x: Tensor, tokens_per_expert: Tensor, out: Tensor, accumulate: bool) -> None:
    return None
