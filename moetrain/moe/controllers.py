"""State of the training that follows from counts and not from gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Controlled(nn.Module):
    """A module with controllers: buffers in fp32, the same on all ranks, which checkpoints keep under their names
    (`controller.decoder.layers.<i>.mlp.router.<name>`) and which only a step of the training moves."""

    def __init__(self) -> None:
        super().__init__()
        self._controllers: list[str] = []

    def add_controller(self, name: str, value: Tensor) -> None:
        """Make `value`, of any shape, a controller."""
        assert value.dtype == torch.float32
        self.register_buffer(name, value, persistent=False)
        self._controllers.append(name)

    def controllers(self) -> Iterator[tuple[str, Tensor]]:
        """Name and live tensor of every controller."""
        for name in self._controllers:
            yield name, self.get_buffer(name)
