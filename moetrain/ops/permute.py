"""From tokens to rows sorted by expert, and back.

Legend: T tokens, K expert slots a token (its number of experts may vary: -1 marks an unused slot), R routed
rows, E experts, D hidden, W source ranks. No function here communicates.

Source: the dispatch of Switch Transformer (arXiv 2101.03961, section 2.2), without a capacity: every used
slot is a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.ops import library as _library  # noqa: F401  (registers the operators)

_ops = torch.ops.moetrain


class PermutePlan(NamedTuple):
    """Which row comes from which slot. Rows are sorted by expert, then by slot; all tensors are int64.

    row_token_R: token of each row.
    row_slot_R: flat slot ``t * K + j`` of each row.
    slot_row_TK: row of each slot, -1 for an unused one.
    tokens_per_expert_E: rows of each expert.
    """

    row_token_R: Tensor
    row_slot_R: Tensor
    slot_row_TK: Tensor
    tokens_per_expert_E: Tensor


def plan_permutation(expert_ids_TK: Tensor, num_experts: int) -> PermutePlan:
    """Stable counting sort of the used slots by expert.

    Args:
        expert_ids_TK: int64, each entry in ``[-1, num_experts)``; -1 marks an unused slot. T or K may be 0.
        num_experts: at least 1.

    Raises:
        ValueError: an id out of range (says where), another dtype or shape.

    On CUDA this waits for the device once: R is data.
    """
    return PermutePlan(*_ops.plan_permutation(expert_ids_TK, num_experts))


def permute(x_TD: Tensor, plan: PermutePlan) -> Tensor:
    """``rows_RD[r] = x_TD[plan.row_token_R[r]]``; any dtype.

    The gradient of a token is the sum of its rows' gradients, in slot order, accumulated in float32: no
    atomics, hence the same bits on every run (float32 and bfloat16 only).
    """
    return _ops.permute_rows(x_TD, plan.row_token_R, plan.slot_row_TK)


def unpermute(rows_RD: Tensor, plan: PermutePlan) -> Tensor:
    """``y_TD[t]`` = sum of the rows of token ``t`` in slot order, float32 accumulation; zero without any.

    The adjoint of :func:`permute`, and :func:`combine` with weights of one. float32 or bfloat16.
    """
    return _ops.unpermute_rows(rows_RD, plan.row_token_R, plan.slot_row_TK)


def combine(rows_RD: Tensor, weights_TK: Tensor, plan: PermutePlan) -> Tensor:
    """``y_TD[t] = sum over used slots j of weights_TK[t, j] * rows_RD[plan.slot_row_TK[t, j]]``.

    Args:
        rows_RD: float32 or bfloat16, in the order of the plan.
        weights_TK: float32; entries of unused slots are ignored and get a gradient of exactly 0.

    Returns:
        ``[T, D]`` in the dtype of the rows, summed in slot order in float32.
    """
    return _ops.combine_rows(rows_RD, weights_TK, plan.slot_row_TK)


def reorder_by_expert(counts_WE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How to turn received rows, which stand in (source rank, local expert) order, into expert order.

    Args:
        counts_WE: int64, rows that rank ``w`` sent for local expert ``e``.

    Returns:
        ``index_R``, which received row stands where (rows of one expert keep the order of their source
        ranks), its inverse ``inverse_R``, and ``tokens_per_expert_E``.
    """
    if counts_WE.dim() != 2 or counts_WE.dtype != torch.int64:
        raise ValueError(f"counts_WE must be int64 [ranks, experts], it is {counts_WE.dtype} {tuple(counts_WE.shape)}")
    flat = counts_WE.reshape(-1)
    first_WE = (flat.cumsum(0) - flat).view_as(counts_WE)
    counts_EW = counts_WE.t().reshape(-1)
    index_R = torch.repeat_interleave(first_WE.t().reshape(-1) - (counts_EW.cumsum(0) - counts_EW), counts_EW)
    rows_R = torch.arange(index_R.numel(), device=counts_WE.device)
    index_R += rows_R
    inverse_R = torch.empty_like(index_R)
    inverse_R[index_R] = rows_R
    return index_R, inverse_R, counts_WE.sum(dim=0)


# ---- fake kernels: shapes only. Gradients are in csrc/autograd.cpp.


@torch.library.register_fake("moetrain::plan_permutation")
def _plan_fake(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, ...]:
    rows = torch.library.get_ctx().new_dynamic_size()
    return (
        expert_ids.new_empty(rows),
        expert_ids.new_empty(rows),
        expert_ids.new_empty(expert_ids.shape),
        expert_ids.new_empty(num_experts),
    )


@torch.library.register_fake("moetrain::permute_rows")
def _permute_fake(x: Tensor, row_token: Tensor, slot_row: Tensor) -> Tensor:
    return x.new_empty(row_token.size(0), x.size(1))


@torch.library.register_fake("moetrain::unpermute_rows")
def _unpermute_fake(rows: Tensor, row_token: Tensor, slot_row: Tensor) -> Tensor:
    return rows.new_empty(slot_row.size(0), rows.size(1))


@torch.library.register_fake("moetrain::combine_rows")
def _combine_fake(rows: Tensor, weights: Tensor, slot_row: Tensor) -> Tensor:
    return rows.new_empty(slot_row.size(0), rows.size(1))


@torch.library.register_fake("moetrain::combine_rows_backward")
def _combine_backward_fake(grad: Tensor, rows: Tensor, weights: Tensor, slot_row: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)
