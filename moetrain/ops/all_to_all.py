"""Uneven all-to-all of rows over a process group, differentiable: one that waits, and one that can be waited for later.

Legend: R rows sent, S rows received, D any trailing shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

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
        _check_group_of_one(x_RD, outputs, inputs)
        return x_RD
    return _ops.all_to_all(x_RD, outputs, inputs, group.group_name)


def start_all_to_all(
    x_RD: Tensor,
    output_splits: Sequence[int],
    input_splits: Sequence[int],
    group: dist.ProcessGroup,
    out_SD: Tensor | None = None,
) -> PendingRows:
    """:func:`all_to_all` that returns at once; ``wait`` of the result gives the rows.

    What stands between start and wait runs while the rows travel: in the forward, and again in the backward, where the
    gradients leave when autograd reaches the wait and are waited for when it reaches the start. Autograd works
    backward through the order of the forward, so every rank starts its exchanges in the same order if all ranks did
    so in the forward.

    Args:
        out_SD: a contiguous place for the rows; there is no gradient then.

    Communication, errors: those of :func:`all_to_all`. On CUDA nothing here waits on the host: starting and waiting
    order the current stream and the group's.
    """
    exchange = _Exchange(list(output_splits), list(input_splits), group)
    exchange.check(x_RD)
    if group.size() == 1 and out_SD is None:
        return PendingRows.arrived(x_RD)
    if out_SD is None and torch.is_grad_enabled() and x_RD.requires_grad:
        rows_SD = _Depart.apply(x_RD, exchange)
        return PendingRows(lambda: _Arrive.apply(rows_SD, exchange))
    rows_SD = exchange.post(x_RD.detach(), out_SD)
    return PendingRows(lambda: exchange.finish(rows_SD))


def _check_group_of_one(x_RD: Tensor, outputs: list[int], inputs: list[int]) -> None:
    if outputs != inputs or inputs != [x_RD.size(0)]:
        raise ValueError(
            f"all_to_all in a group of one: input_splits {inputs} and output_splits {outputs} "
            f"must both be [{x_RD.size(0)}], the rows of x"
        )


class PendingRows:
    """Rows that an all-to-all is bringing."""

    def __init__(self, arrive: Callable[[], Any]) -> None:
        self._arrive: Callable[[], Any] | None = arrive

    @classmethod
    def arrived(cls, rows_SD: Tensor) -> PendingRows:
        """Rows that are there already, for callers that may but need not do other work meanwhile."""
        return cls(lambda: rows_SD)

    def wait(self) -> Tensor:
        """The rows, in order of source rank. To be called once: nothing here keeps them alive afterwards."""
        assert self._arrive is not None, "these rows were handed out before"
        arrive, self._arrive = self._arrive, None
        return arrive()


class _Exchange:
    """One all-to-all, there and (for gradients) back."""

    def __init__(self, output_splits: list[int], input_splits: list[int], group: dist.ProcessGroup) -> None:
        self.output_splits, self.input_splits, self.group = output_splits, input_splits, group
        self.homeward: tuple[_Exchange, Tensor] | None = None
        self._work: dist.Work | None = None
        self._sent: Tensor | None = None

    def check(self, x_RD: Tensor) -> None:
        size = self.group.size()
        if size == 1:
            _check_group_of_one(x_RD, self.output_splits, self.input_splits)
        for name, splits in (("output_splits", self.output_splits), ("input_splits", self.input_splits)):
            if len(splits) != size:
                raise ValueError(f"all_to_all: {name} has {len(splits)} entries, the group has {size} ranks")
            if min(splits) < 0:
                raise ValueError(f"all_to_all: {name} must not be negative, it is {splits}")
        if sum(self.input_splits) != x_RD.size(0):
            raise ValueError(f"all_to_all: input_splits sum to {sum(self.input_splits)}, x has {x_RD.size(0)} rows")

    def reversed(self) -> _Exchange:
        return _Exchange(self.input_splits, self.output_splits, self.group)

    def post(self, x_RD: Tensor, out_SD: Tensor | None = None) -> Tensor:
        """Sends; the result is filled once `finish` has returned."""
        if self.group.size() == 1:
            return x_RD if out_SD is None else out_SD.copy_(x_RD)
        if out_SD is None:
            out_SD = x_RD.new_empty(sum(self.output_splits), *x_RD.shape[1:])
        self._sent = x_RD.contiguous()  # must live until the backend has read it
        self._work = dist.all_to_all_single(
            out_SD, self._sent, self.output_splits, self.input_splits, group=self.group, async_op=True
        )
        return out_SD

    def finish(self, rows_SD: Tensor) -> Tensor:
        """What `post` returned, now filled."""
        if self._work is not None:
            self._work.wait()  # releases the interpreter lock
        self._work = self._sent = None
        return rows_SD


class _Depart(torch.autograd.Function):
    """Posts the rows; its backward waits for their gradients, which `_Arrive`'s has posted."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.post(x_RD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, unfilled_SD: Tensor) -> tuple[Tensor, None]:
        exchange, grad_RD = ctx.exchange.homeward
        ctx.exchange.homeward = None
        return exchange.finish(grad_RD), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_SD: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        ctx.mark_dirty(rows_SD)
        return exchange.finish(rows_SD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor, None]:
        homeward = ctx.exchange.reversed()
        ctx.exchange.homeward = (homeward, homeward.post(grad_SD))
        # What `_Depart` gets from here has no meaning but its shape; it waits for what was posted.
        return grad_SD, None


@torch.library.register_fake("moetrain::all_to_all")
def _fake(x: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], group_name: str) -> Tensor:
    return x.new_empty(sum(output_splits), *x.shape[1:])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.output_splits, ctx.input_splits, ctx.group_name = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return _ops.all_to_all(grad, ctx.input_splits, ctx.output_splits, ctx.group_name), None, None, None


torch.library.register_autograd("moetrain::all_to_all", _backward, setup_context=_setup)
