"""A copy of a rank's share in host memory, so that training may go on while it is written.

Almost all of the share changes in the optimizer's update alone. That part is copied by the thread that writes it,
beside the next forward and backward pass, and training waits for it just before the update.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace

import torch

from moetrain.checkpoint.store import Piece

_ALIGNMENT = 64

logger = logging.getLogger(__name__)


class StagedShare:
    """Places for all pieces, of which the steady ones are filled by `finish`, in any thread.

    `pieces`: complete after `finish`, and until the buffer stages again.
    """

    def __init__(self, live: list[Piece], pieces: list[Piece]) -> None:
        self.pieces = pieces
        self._to_copy = [(old, new) for old, new in zip(live, pieces, strict=True) if old.steady]
        # A stream of its own, for the copies to run beside those kernels of training that only read.
        self._stream = None
        if any(old.tensor.is_cuda for old, _ in self._to_copy):
            self._stream = torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.current_stream())  # the update before must have been made

    def finish(self) -> None:
        """Copy the steady pieces. Before the end of this call they must not change."""
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            for old, new in self._to_copy:
                new.tensor.copy_(old.tensor.detach(), non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()
        self._to_copy = []


class StagingBuffer:
    """One block of host memory, as large as the largest share so far, and used again by every save.

    It is page-locked when a piece lies on an accelerator: then the copies run at the speed of the bus.
    """

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None
        self._pinned = False  # or tried to be

    @property
    def nbytes(self) -> int:
        """What it takes of this process's memory."""
        return 0 if self._memory is None else self._memory.nbytes

    def stage(self, pieces: Iterable[Piece]) -> StagedShare:
        """The same pieces with values as of now, steady ones after `finish`. The next call overwrites them."""
        live = list(pieces)
        starts, size = [], 0
        for piece in live:
            starts.append(size)
            size += -(-piece.tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        memory = self._reserve(size, any(piece.tensor.is_cuda for piece in live))
        staged = []
        for piece, start in zip(live, starts, strict=True):
            source = piece.tensor.detach()
            place = memory[start : start + source.nbytes].view(source.dtype).view(source.shape)
            if not piece.steady:
                place.copy_(source)
            staged.append(replace(piece, tensor=place))
        return StagedShare(live, staged)

    def _reserve(self, size: int, pinned: bool) -> torch.Tensor:
        if self._memory is None or self._memory.nbytes < size or (pinned and not self._pinned):
            self._memory = None  # before the next is allocated: there must never be two
            self._memory, self._pinned = _allocate(size, pinned), pinned
        return self._memory


def _allocate(size: int, pinned: bool) -> torch.Tensor:
    if pinned:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:  # a slower save is better than none
            logger.warning("no %d bytes of page-locked memory; saves stall longer without: %s", size, error)
    return torch.empty(size, dtype=torch.uint8)
