from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moetrain.checkpoint import CheckpointManager, Piece, SingleProcess

Flip = Callable[[Path, int], None]


@pytest.fixture
def manager(tmp_path: Path) -> CheckpointManager:
    return CheckpointManager(tmp_path / "checkpoints", keep_last=3, comm=SingleProcess())


@pytest.fixture
def save_step(manager: CheckpointManager) -> Callable[[int], Path]:
    """Save a small checkpoint in which every element tells the step."""

    def save(step: int) -> Path:
        pieces = [
            Piece("weight.a", (4, 3), (0, 0), torch.full((2, 3), float(step))),
            Piece("weight.a", (4, 3), (2, 0), torch.full((2, 3), float(step) + 0.5)),
            Piece.whole("controller.alpha", torch.tensor(float(step))),
            Piece.whole("rng.0", torch.arange(16, dtype=torch.uint8)),
        ]
        return manager.save(step, step * 8, pieces, {"model": {"hidden_size": 4}}, {"world_size": 1}, {"note": "x"})

    return save


@pytest.fixture
def flip_bit() -> Flip:
    def flip(path: Path, position: int) -> None:
        data = bytearray(path.read_bytes())
        data[position] ^= 1
        path.write_bytes(data)

    return flip
