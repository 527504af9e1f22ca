"""Keeps Python's garbage collector off the long-lived objects."""

from __future__ import annotations

import gc

from moetrain.train.callback import Callback, TrainerView
from moetrain.train.metrics import StepReport


class GarbageCallback(Callback):
    """Freezes what exists after the first step of this process.

    A full collection walks every object of torch, Megatron and the model, takes up to half a second, and comes at
    another step on each rank, so all ranks wait for each in turn. None of those objects will ever die.
    """

    def __init__(self) -> None:
        self._frozen = False

    def on_step_end(self, trainer: TrainerView, report: StepReport) -> None:
        if not self._frozen:
            gc.collect()
            gc.freeze()
            self._frozen = True

    def on_train_end(self, trainer: TrainerView) -> None:
        self._thaw()

    def on_error(self, trainer: TrainerView, exc: BaseException) -> None:
        self._thaw()

    def _thaw(self) -> None:
        if self._frozen:
            gc.unfreeze()
            self._frozen = False
