"""Axis-aligned rectangles of a global tensor: the arithmetic that lets any layout read what any other one wrote.

Tensor and expert parallelism give a rank rectangles; ZeRO then gives it a flat range of what it got. Both end as
rectangles of the global tensor, so a checkpoint needs to know nothing of either.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rect:
    """The elements `offset[d] <= index[d] < offset[d] + shape[d]`. The rectangle of a scalar is `Rect((), ())`."""

    offset: Shape
    shape: Shape

    @classmethod
    def whole(cls, shape: Shape) -> Rect:
        """All of a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def stop(self) -> Shape:
        """One past the last index, per dimension."""
        return tuple(o + n for o, n in zip(self.offset, self.shape, strict=True))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def fits(self, shape: Shape) -> bool:
        """Whether this is a rectangle of a tensor of that shape."""
        return (
            len(self.offset) == len(self.shape) == len(shape)
            and all(o >= 0 and n >= 0 for o, n in zip(self.offset, self.shape, strict=True))
            and all(stop <= n for stop, n in zip(self.stop, shape, strict=True))
        )

    def shifted(self, by: Shape) -> Rect:
        """The same rectangle, seen from an origin that lies at `-by`."""
        return Rect(tuple(o + b for o, b in zip(self.offset, by, strict=True)), self.shape)

    def slices_from(self, origin: Shape) -> tuple[slice, ...]:
        """Index of this rectangle in an array whose first element is the global element `origin`."""
        return tuple(
            slice(o - start, o - start + n) for o, start, n in zip(self.offset, origin, self.shape, strict=True)
        )

    def __str__(self) -> str:
        return f"offset {list(self.offset)} shape {list(self.shape)}"


def intersect(a: Rect, b: Rect) -> Rect | None:
    """The elements in both, or None when there are none."""
    offset = tuple(map(max, zip(a.offset, b.offset, strict=True)))
    shape = tuple(min(p, q) - o for p, q, o in zip(a.stop, b.stop, offset, strict=True))
    return Rect(offset, shape) if all(n > 0 for n in shape) else None


def flat_range_to_rects(shape: Shape, start: int, stop: int) -> list[tuple[Rect, int]]:
    """Cut elements [start, stop) of a row-major array into rectangles that are contiguous in that order.

    Returns (rectangle, flat index of its first element) in ascending order; at most 2N - 1 of them for N > 0
    dimensions (a ragged head and a ragged tail of N - 1 each, and the whole rows between), one for a scalar.
    """
    total = math.prod(shape)
    assert 0 <= start <= stop <= total, f"flat range [{start}, {stop}) does not lie in {list(shape)} ({total} elements)"
    return list(_cut(tuple(shape), start, stop))


def _cut(shape: Shape, start: int, stop: int):
    if start == stop:
        return
    if not shape:
        yield Rect((), ()), 0
        return
    row_size = math.prod(shape[1:])
    first_whole, end_whole = -(-start // row_size), stop // row_size
    if first_whole > end_whole:
        yield from _cut_row(shape, end_whole, start, stop)
        return
    if start < first_whole * row_size:
        yield from _cut_row(shape, first_whole - 1, start, first_whole * row_size)
    if first_whole < end_whole:
        zeros = (0,) * (len(shape) - 1)
        yield Rect((first_whole, *zeros), (end_whole - first_whole, *shape[1:])), first_whole * row_size
    if end_whole * row_size < stop:
        yield from _cut_row(shape, end_whole, end_whole * row_size, stop)


def _cut_row(shape: Shape, row: int, start: int, stop: int):
    """The part [start, stop) that lies inside one row of dimension 0."""
    base = row * math.prod(shape[1:])
    for rect, flat in _cut(shape[1:], start - base, stop - base):
        yield Rect((row, *rect.offset), (1, *rect.shape)), base + flat


def first_fault(shape: Shape, rects: list[Rect]) -> tuple[Rect, list[int]] | None:
    """The first region of a tensor that is not covered exactly once, with the indices in `rects` that cover it.

    None when the rectangles tile the tensor. The rectangles must fit the shape and hold at least one element each.
    Sweeps dimension 0 slab by slab and recurses into each slab, so the usual row-wise and column-wise tilings cost
    about n log n.
    """
    fault = _fault_below(tuple(shape), rects, list(range(len(rects))), 0)
    return None if fault is None else (Rect(tuple(fault[0]), tuple(fault[1])), sorted(fault[2]))


def _fault_below(shape: Shape, rects: list[Rect], owners: list[int], dim: int):
    """(offset, shape, owners) of a fault in dimensions `dim` and up, where only `owners` are present."""
    if dim == len(shape):
        return None if len(owners) == 1 else ([], [], owners)
    waiting = sorted(owners, key=lambda i: rects[i].offset[dim], reverse=True)
    edges = {rects[i].offset[dim] for i in owners} | {rects[i].stop[dim] for i in owners}
    active: list[int] = []
    for low, high in pairwise(sorted(edges | {0, shape[dim]})):
        active = [i for i in active if rects[i].stop[dim] > low]
        while waiting and rects[waiting[-1]].offset[dim] == low:
            active.append(waiting.pop())
        fault = _fault_below(shape, rects, active, dim + 1)
        if fault is not None:
            offset, extent, found = fault
            return [low, *offset], [high - low, *extent], found
    return None
