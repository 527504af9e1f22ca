"""Between a rank's flat memory and the global tensors of a checkpoint.

A rank holds a *local* parameter (what tensor and expert parallelism leave it), and of that ZeRO gives it a flat
slice. `pieces_of` names the rectangles of such a slice; `fill_from` fills such a slice from whatever was saved. The
two need not agree on anything but the global tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from moetrain.checkpoint.reader import CheckpointReader
from moetrain.checkpoint.rectangles import Rect, Shape, flat_range_to_rects
from moetrain.checkpoint.store import Piece
from moetrain.errors import CheckpointError
from moetrain.runtime.parameters import ParameterInfo


@dataclass(frozen=True)
class ParameterShard:
    """Where the elements of a local parameter lie in the global tensor.

    `rects` lists (flat index of its first element in local memory, rectangle of the global tensor), in local order and
    without gaps; each rectangle lies row-major in local memory. One rectangle is the rule; a tensor-parallel SwiGLU
    fc1 has two, its gate rows and its up rows.
    """

    name: str
    global_shape: Shape
    rects: tuple[tuple[int, Rect], ...]

    def __post_init__(self) -> None:
        expected = 0
        for start, rect in self.rects:
            assert rect.fits(self.global_shape), f"{self.name}: {rect} does not fit {self.global_shape}"
            assert start == expected, (
                f"{self.name}: a rectangle starts at {start}, the one before it ends at {expected}"
            )
            expected += rect.numel

    @classmethod
    def of(cls, info: ParameterInfo) -> ParameterShard:
        """From the model's description of a parameter."""
        columns = tuple(info.local_shape[1:])
        rects, start = [], 0
        for block in info.blocks:
            rect = Rect(tuple(block.offset), (block.rows, *columns))
            rects.append((start, rect))
            start += rect.numel
        numel = math.prod(info.local_shape)
        assert start == numel, f"{info.name}: blocks hold {start} of {numel} elements"
        return cls(info.name, tuple(info.global_shape), tuple(rects))

    @property
    def numel(self) -> int:
        """Elements of the local parameter."""
        return sum(rect.numel for _, rect in self.rects)

    def fragment(self, start: int, length: int) -> Iterator[tuple[slice, Rect]]:
        """Cut local elements [start, start + length) into global rectangles.

        Yields (slice of the fragment, rectangle); the slice holds the rectangle in row-major order.
        """
        assert 0 <= start <= start + length <= self.numel, (
            f"{self.name}: local elements [{start}, {start + length}) of {self.numel}"
        )
        for first, block in self.rects:
            low, high = max(start, first), min(start + length, first + block.numel)
            if low >= high:
                continue
            for rect, flat in flat_range_to_rects(block.shape, low - first, high - first):
                at = first + flat - start
                yield slice(at, at + rect.numel), rect.shifted(block.offset)


def pieces_of(
    shard: ParameterShard, name_prefix: str, flat_tensor: Tensor, start: int = 0, steady: bool = False
) -> list[Piece]:
    """What to store for local elements [start, start + len(flat_tensor)) of a parameter; `steady` as in `Piece`.

    `flat_tensor` is 1-d and contiguous, any dtype and device; the pieces are views of it. Their tensor is called
    `name_prefix + shard.name`. Replicas (over data parallelism, or of unsplit tensors over tensor parallelism) must be
    passed in by one of their holders only: the save refuses an element with two owners.
    """
    name = f"{name_prefix}{shard.name}"
    return [
        Piece(name, shard.global_shape, rect.offset, flat_tensor[part].view(rect.shape), steady)
        for part, rect in shard.fragment(start, flat_tensor.numel())
    ]


def fill_from(
    reader: CheckpointReader, shard: ParameterShard, name_prefix: str, flat_tensor: Tensor, start: int = 0
) -> None:
    """The inverse of `pieces_of`: fill the fragment in place from a checkpoint of any layout.

    Reads no more of the files than the fragment. CheckpointError when the tensor is absent or has another shape or
    dtype. No communication.
    """
    name = f"{name_prefix}{shard.name}"
    if reader.shape(name) != tuple(shard.global_shape):
        raise CheckpointError(
            f"{reader.folder}: tensor {name!r} has shape {list(reader.shape(name))}; "
            f"this model needs {list(shard.global_shape)}"
        )
    for part, rect in shard.fragment(start, flat_tensor.numel()):
        reader.read_into(name, rect.offset, flat_tensor[part].view(rect.shape))


def rng_piece(rank: int, state: Tensor) -> Piece:
    """A rank's random-generator state (uint8, 1-d), stored as `rng.<rank>`."""
    return Piece.whole(_rng_name(rank), state)


def read_rng(reader: CheckpointReader, rank: int) -> Tensor | None:
    """The state that rank `rank` saved, or None when the saving run had no such rank."""
    name = _rng_name(rank)
    return reader.read(name) if name in reader.manifest.record.tensors else None


def _rng_name(rank: int) -> str:
    return f"rng.{rank}"
