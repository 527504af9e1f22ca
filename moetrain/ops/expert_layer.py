"""The experts of one rank as one operator: gather, fc1, SwiGLU, fc2, weighted combine.

Legend: T tokens, K expert slots a token, R routed rows, E experts, D hidden size, F expert width. No function here
communicates.

Source: the SwiGLU experts of arXiv 2401.04088 (section 2.1), for any number of experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.ops import library as _library  # noqa: F401  (registers the operators)
from moetrain.ops.permute import PermutePlan

_ops = torch.ops.moetrain


def expert_layer(x_TD: Tensor, weights_TK: Tensor | None, fc1: Tensor, fc2: Tensor, plan: PermutePlan) -> Tensor:
    """``y[t] = sum over used slots j of weights[t, j] * fc2[e] (silu(gate) * up)`` with ``gate, up = fc1[e] x[t]``.

    Args:
        x_TD: float32 or bfloat16.
        weights_TK: float32, or None for weights of one.
        fc1: ``[E, 2F, D]``, gate rows, then up rows; dtype of ``x_TD``.
        fc2: ``[E, D, F]``.
        plan: which slot goes to which expert; slots may be unused.

    Returns:
        ``[T, D]``; zero for a token without experts. Differentiable in everything but the plan.

    No routed copy of ``x_TD`` and no activation is kept for the backward: only the output of fc1, ``2 R F`` elements
    (nothing at all without gradients). Sums are float32; rounded to the dtype are fc1's and fc2's outputs and the
    activation. Row-invariant: a token's output, and the gradients of its ``x_TD`` and ``weights_TK``, depend on that
    token only; those of the weights have the same bits for any number of threads.

    Raises:
        ValueError: shapes, dtypes, devices or the plan disagree.
    """
    needs_grad = any(t is not None and t.requires_grad for t in (x_TD, weights_TK, fc1, fc2))
    y_TD, _ = _ops.expert_layer_forward(
        x_TD,
        weights_TK,
        fc1,
        fc2,
        plan.row_token_R,
        plan.slot_row_TK,
        plan.tokens_per_expert_E,
        needs_grad and torch.is_grad_enabled(),
    )
    return y_TD


@torch.library.register_fake("moetrain::expert_layer_forward")
def _forward_fake(
    x: Tensor,
    weights: Tensor | None,
    fc1: Tensor,
    fc2: Tensor,
    row_token: Tensor,
    slot_row: Tensor,
    tokens_per_expert: Tensor,
    save: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(row_token.size(0) if save else 0, fc1.size(1))


@torch.library.register_fake("moetrain::expert_layer_backward")
def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weights: Tensor | None,
    fc1: Tensor,
    fc2: Tensor,
    row_token: Tensor,
    slot_row: Tensor,
    tokens_per_expert: Tensor,
    z: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = (x, slot_row, fc1, fc2)
    shapes = [t.shape if want else (0,) for t, want in zip(like, wanted, strict=True)]
    if weights is None:
        shapes[1] = (0,)
    return (
        x.new_empty(shapes[0]),
        x.new_empty(shapes[1], dtype=torch.float32),
        x.new_empty(shapes[2]),
        x.new_empty(shapes[3]),
    )
