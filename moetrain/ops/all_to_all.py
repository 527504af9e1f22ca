"""Uneven all-to-all of rows over a process group, differentiable.

Legend: R rows sent, S rows received, D any trailing shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.ops import library as _library  # noqa: F401  (registers the operators)

_ops = torch.ops.moetrain


def all_to_all(
    x_RD: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """Sends ``input_splits[w]`` rows to rank ``w`` of the group and receives ``output_splits[w]`` from it.

    Args:
        x_RD: rows in order of destination rank; any dtype that the backend sends.
        output_splits: rows to receive from each rank of the group; ranks must agree with each other.
        input_splits: rows to send to each; sums to R.

    Returns:
        ``[sum(output_splits), ...]`` in order of source rank.

    Communication: one all-to-all in the forward and one, with the splits exchanged, in the backward. Every
    rank of the group takes part, also with no rows. A group of one communicates nothing and returns ``x_RD``
    itself. The interpreter lock is free while it waits.

    Raises:
        ValueError: splits that do not fit the group or the rows.
    """
    outputs, inputs = list(output_splits), list(input_splits)
    if group.size() == 1:
        if outputs != inputs or inputs != [x_RD.size(0)]:
            raise ValueError(
                f"all_to_all in a group of one: input_splits {inputs} and output_splits {outputs} "
                f"must both be [{x_RD.size(0)}], the rows of x"
            )
        return x_RD
    return _ops.all_to_all(x_RD, outputs, inputs, group.group_name)


@torch.library.register_fake("moetrain::all_to_all")
def _fake(x: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], group_name: str) -> Tensor:
    return x.new_empty(sum(output_splits), *x.shape[1:])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.output_splits, ctx.input_splits, ctx.group_name = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return _ops.all_to_all(grad, ctx.input_splits, ctx.output_splits, ctx.group_name), None, None, None


torch.library.register_autograd("moetrain::all_to_all", _backward, setup_context=_setup)
