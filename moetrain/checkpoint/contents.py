"""What a checkpoint is made of, and where two of them differ. Reads a block at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from moetrain.checkpoint.manifest import TensorEntry
from moetrain.checkpoint.reader import CheckpointReader
from moetrain.checkpoint.rectangles import Rect, Shape

_PARTS = {"weight.": "weights", "optimizer.": "optimizer", "controller.": "controllers", "rng.": "random states"}
_BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Part:
    """All tensors of one use."""

    tensors: int
    elements: int
    nbytes: int


@dataclass(frozen=True)
class TensorDifference:
    """One tensor of two checkpoints. `only_in`: "a" or "b" where the other lacks it. `mismatch`: shapes or dtypes,
    where they differ. Else `max_abs` (NaN if one has a NaN where the other has none), and how many elements differ in
    a bit."""

    name: str
    only_in: str = ""
    mismatch: str = ""
    max_abs: float = 0.0
    differing: int = 0
    elements: int = 0

    @property
    def is_equal(self) -> bool:
        """To the bit."""
        return not (self.only_in or self.mismatch or self.differing)


def part_of(name: str) -> str:
    """What a tensor is for, by its name."""
    return next((part for prefix, part in _PARTS.items() if name.startswith(prefix)), "other")


def parts(reader: CheckpointReader) -> dict[str, Part]:
    """By use, in the order weights, optimizer, controllers, random states, other."""
    totals: dict[str, list[int]] = {part: [0, 0, 0] for part in (*_PARTS.values(), "other")}
    for name, entry in reader.manifest.record.tensors.items():
        count = math.prod(entry.shape)
        for i, n in enumerate((1, count, count * entry.torch_dtype.itemsize)):
            totals[part_of(name)][i] += n
    return {part: Part(*total) for part, total in totals.items() if total[0]}


def differences(a: CheckpointReader, b: CheckpointReader) -> Iterator[TensorDifference]:
    """Every tensor of either, by name. Holds a block of one tensor of each in memory."""
    for name in sorted({*a.names(), *b.names()}):
        entries = [reader.manifest.record.tensors.get(name) for reader in (a, b)]
        yield _difference(name, a, b, *entries)


def _difference(
    name: str, a: CheckpointReader, b: CheckpointReader, mine: TensorEntry | None, other: TensorEntry | None
) -> TensorDifference:
    if mine is None or other is None:
        return TensorDifference(name, only_in="b" if mine is None else "a")
    if (mine.dtype, mine.shape) != (other.dtype, other.shape):
        told = f"{mine.dtype} {list(mine.shape)} and {other.dtype} {list(other.shape)}"
        return TensorDifference(name, mismatch=told)
    largest, differing = 0.0, 0
    for rect in _blocks(mine.shape, mine.torch_dtype.itemsize):
        x, y = (reader.read(name, rect.offset, rect.shape) for reader in (a, b))
        unequal = _bytes(x) != _bytes(y)
        if not unequal.any():
            continue
        differing += int(unequal.any(dim=1).sum())
        delta = (x.double() - y.double()).abs().max().item()
        largest = delta if math.isnan(delta) else max(largest, delta)  # a NaN that comes first stays
    return TensorDifference(name, max_abs=largest, differing=differing, elements=math.prod(mine.shape))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """[elements, bytes]: bits, so that a NaN equals itself and 0 is not -0."""
    return tensor.reshape(-1, 1).view(torch.uint8)


def _blocks(shape: Shape, itemsize: int) -> Iterator[Rect]:
    """Whole rows of dimension 0, as many as fit; a scalar is one block."""
    if not shape:
        yield Rect((), ())
        return
    row = max(1, math.prod(shape[1:]) * itemsize)
    rows = max(1, _BLOCK_BYTES // row)
    for start in range(0, shape[0], rows):
        yield Rect((start, *(0,) * (len(shape) - 1)), (min(rows, shape[0] - start), *shape[1:]))
