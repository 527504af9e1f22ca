"""A ceiling of what dispatch and experts allocate, from sizes alone: nothing the router does can exceed it. No torch.

Every moment that can be the worst one is a line below: what is alive then, in rows.
`tests/distributed/test_dispatch.py` holds the lines to the allocator.

Legend: R most rows of a rank, M most rows that arrive at a rank at once, S most rows that leave it at once, D hidden
size, F expert width, L experts of a rank, W expert ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

_INDEX, _FLOAT = 8, 4  # bytes of an int64, of a float32

# What `moetrain.ops.expert_layer` holds for each of its rows besides its input and the gradient it is given: how many
# times D, and F, elements (its output and the gradient of its input count), and in the backward how many times the
# weights' F x D for each expert with rows. The portable forward; that of AMX holds less, and is never the worst moment.
_SAVED = (0, 2)
_FORWARD = ((1, 3), (2, 2))
_BACKWARD = (2, 5, 3)
# The same of ReLU experts, which copy their rows, and keep them, the activation and the results.
_RELU_SAVED = (2, 1)
_RELU_FORWARD = ((4, 2),)
_RELU_BACKWARD = (4, 3, 3)
# What `DiverseExperts` holds besides: sorted rows and results, in the backward their gradients; between the
# two, rows and results; and beside the gradients of all weights their parts, and fc2 in the order of the operator.
_DIVERSE, _DIVERSE_KEPT, _DIVERSE_WEIGHTS = 4, 2, 6


@dataclass(frozen=True)
class DispatchBound:
    """Bytes of one layer at its worst moment, beyond its input, output, parameters and their gradients.

    The scratch of kernels, a few blocks for each thread, does not count.

    Attributes:
        plan: which row goes where, and router weights by row.
        home: results, in the backward gradients, of this rank's rows.
        travel: rows on their way or waiting for the experts, with their gradients in the backward.
        experts: activations of the rows that are computed.
        weight_gradients: of one round, before they are added to those of the parameters; where widths differ, before
            they lie in one tensor.
        kept: what stays allocated between forward and backward, no part of the total: a model has this for each layer
            whose backward is due, and the total for one.
    """

    plan: int
    home: int
    travel: int
    experts: int
    weight_gradients: int
    kept: int

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return self.plan + self.home + self.travel + self.experts + self.weight_gradients


def dispatch_bound(
    tokens: int,
    max_k: int,
    num_experts_local: int,
    hidden: int,
    ffn: int,
    precision: Literal["fp32", "bf16"],
    max_rows: int | None,
    expert_ranks: int,
    overlap: bool = True,
    padded_rows: int | None = None,
    diverse_width: int | None = None,
    gated: bool = True,
) -> DispatchBound:
    """The bound for a rank that routes `tokens` tokens (of its micro-batch, after sequence is split over tensor ranks)
    to at most `max_k` experts each; the other arguments are settings of `model.moe` and `parallel.expert`.

    `padded_rows`: size of the buffer that the rank sends to each expert (`capacity.pad`), or None. `diverse_width`:
    of experts of different widths, the sum over those of a rank. `ffn` is the widest then, which may get all rows; with
    padding the mean, for all get as many. Without `gated` the activation is ReLU, whose experts copy their rows.
    """
    # A token's experts are distinct, so a rank gets at most as many of its rows as it has experts.
    all_to_one = expert_ranks * tokens * min(max_k, num_experts_local)
    arriving = min(max_rows or all_to_one, all_to_one)
    if padded_rows is not None:
        arriving = expert_ranks * num_experts_local * padded_rows
    sizes = _Sizes(
        rows=tokens * max_k,
        arriving=arriving,
        experts=num_experts_local,
        ranks=expert_ranks,
        hidden=hidden,
        ffn=ffn,
        element=4 if precision == "fp32" else 2,
        overlap=overlap and expert_ranks > 1,
        diverse_width=diverse_width,
        gated=gated,
    )
    moments = list(sizes.in_one_round() if padded_rows is None else sizes.padded())
    if max_rows is not None and max_rows < all_to_one:
        moments += sizes.in_rounds()
    worst = max(moments, key=lambda moment: moment.total)
    return replace(worst, kept=sizes.kept(padded_rows is not None))


@dataclass(frozen=True)
class _Sizes:
    rows: int
    arriving: int
    experts: int
    ranks: int
    hidden: int
    ffn: int
    element: int
    overlap: bool
    diverse_width: int | None
    gated: bool

    @property
    def saved(self) -> tuple[int, int]:
        """Multiples of D and F for each row, between forward and backward."""
        return _SAVED if self.gated else _RELU_SAVED

    @property
    def forward(self) -> tuple[tuple[int, int], ...]:
        """Those of the forward's moments."""
        return _FORWARD if self.gated else _RELU_FORWARD

    @property
    def backward(self) -> tuple[int, int, int]:
        """Those of the backward, and of the weights."""
        return _BACKWARD if self.gated else _RELU_BACKWARD

    @property
    def leaving(self) -> int:
        """Most rows that a rank sends in one round."""
        return min(self.rows, self.ranks * self.arriving)

    def in_one_round(self) -> Iterator[DispatchBound]:
        """Activations are kept for the backward; the weights' gradients are written where they stay."""
        away, home = int(self.ranks > 1), self.leaving * (self.ranks > 1)
        arrived = self.arriving * away  # in one rank, rows are read from the tokens and results are the layer's output
        _, kept = self.saved
        yield self._moment(travel=home + arrived)
        for d, f in self.forward:
            yield self._moment(travel=arrived, d=d - 1 + away, f=f)
        yield self._moment(home=home, travel=2 * arrived, f=kept)
        yield self._moment(home=2 * home, travel=arrived, f=kept)
        d, f, _ = self.backward
        yield self._moment(travel=2 * arrived, d=d - 1 + away, f=f)

    def padded(self) -> Iterator[DispatchBound]:
        """Buffers leave that are as large as what arrives, and are read where they came from also in one rank."""
        buffer, away = self.arriving, int(self.ranks > 1)
        _, kept = self.saved
        yield self._moment(home=self.rows, travel=buffer * (1 + away))
        for d, f in self.forward:
            yield self._moment(travel=buffer * (1 + self.overlap * away), d=d, f=f)
        yield self._moment(home=2 * self.rows, travel=buffer * (2 + away), f=kept)
        d, f, _ = self.backward
        yield self._moment(home=self.rows, travel=buffer * (2 + away), d=d, f=f)

    def in_rounds(self) -> Iterator[DispatchBound]:
        """Nothing is kept. With overlap the next round's rows and the last round's results are there too."""
        beside = self.overlap * (self.leaving + self.arriving)  # the next round: as it leaves and as it comes
        last = self.overlap * self.arriving
        for d, f in self.forward:
            yield self._moment(home=self.rows, travel=self.arriving + beside + last, d=d, f=f)
        if self.ranks > 1:  # rows and gradients leave, before anything is computed
            yield self._moment(home=self.rows, travel=2 * (self.leaving + self.arriving))
        touched = min(self.experts, self.arriving)
        unfinished = 3 * _FLOAT // self.element
        d, f, weights = self.backward
        travel = 2 * self.arriving + 2 * beside + last
        # The recomputed output is there as well.
        yield self._moment(home=self.rows, travel=travel, d=d + 1, f=f, weights=weights * touched + unfinished)

    def kept(self, padded: bool) -> int:
        """One round's activations, which autograd saves, and the plan."""
        d, f = self.saved
        if self.diverse_width is not None:
            d += _DIVERSE_KEPT - _DIVERSE
        travel = self.arriving if padded else 0
        return self._moment(home=self.leaving * (self.ranks > 1 or padded), travel=travel, d=d, f=f).total

    def _moment(self, home: int = 0, travel: int = 0, d: int = 0, f: int = 0, weights: int = 0) -> DispatchBound:
        """From rows at home and on their way, and multiples of what each arrived row, and each expert, takes."""
        row = self.hidden * self.element
        touched = weights * self.ffn
        if self.diverse_width is not None:
            d += _DIVERSE
            touched += _DIVERSE_WEIGHTS * self.diverse_width
        return DispatchBound(
            plan=self.rows * (3 * _INDEX + 2 * _FLOAT) + self.arriving * (2 * _INDEX + 2 * _FLOAT),
            home=home * row,
            travel=travel * row,
            experts=self.arriving * (d * self.hidden + f * self.ffn) * self.element,
            weight_gradients=touched * self.hidden * self.element,
            kept=0,
        )
