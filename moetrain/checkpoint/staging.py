"""A copy of a rank's share in host memory, so that training may go on while it is written."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace

import torch

from moetrain.checkpoint.store import Piece

_ALIGNMENT = 64

logger = logging.getLogger(__name__)


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

    def stage(self, pieces: Iterable[Piece]) -> list[Piece]:
        """The same pieces with values as of now. They are overwritten by the next call."""
        live = list(pieces)
        starts, size = [], 0
        for piece in live:
            starts.append(size)
            size += -(-piece.tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        on_cuda = any(piece.tensor.is_cuda for piece in live)
        memory = self._reserve(size, on_cuda)
        staged = []
        for piece, start in zip(live, starts, strict=True):
            source = piece.tensor.detach()
            place = memory[start : start + source.nbytes].view(source.dtype).view(source.shape)
            place.copy_(source, non_blocking=True)
            staged.append(replace(piece, tensor=place))
        if on_cuda:
            torch.cuda.synchronize()
        return staged

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
