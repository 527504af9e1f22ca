"""TensorBoard event files under `<run.dir>/tensorboard`."""

from __future__ import annotations

from torch.utils.tensorboard.writer import SummaryWriter

from moetrain.train.callback import Callback, TrainerView, is_logged
from moetrain.train.metrics import EvalReport, SaveReport, StepReport, flatten, flatten_lists

FOLDER = "tensorboard"


class TensorBoardCallback(Callback):
    """Writes every flat scalar over iterations, and the per-expert load and the K of each layer as histograms.

    A resumed run tells TensorBoard to hide what the earlier process wrote beyond the checkpoint (`purge_step`). Rank 0.
    """

    def __init__(self) -> None:
        self._writer: SummaryWriter | None = None

    def on_train_start(self, trainer: TrainerView) -> None:
        if trainer.rank == 0:
            self._writer = SummaryWriter(str(trainer.run_dir / FOLDER), purge_step=trainer.start_iteration + 1)

    def on_step_end(self, trainer: TrainerView, report: StepReport) -> None:
        if self._writer is None or not is_logged(trainer, report):
            return
        for name, value in {**flatten(report), **trainer.throughput.flatten()}.items():
            self._writer.add_scalar(name, value, report.iteration)
        for name, weights in flatten_lists(report).items():
            _add_bars(self._writer, name, weights, report.iteration)

    def on_evaluate(self, trainer: TrainerView, report: EvalReport) -> None:
        if self._writer is not None:
            for name, value in flatten(report).items():
                self._writer.add_scalar(name, value, report.iteration)
            self._writer.flush()

    def on_checkpoint(self, trainer: TrainerView, report: SaveReport) -> None:
        if self._writer is not None:
            for name, value in flatten(report).items():
                self._writer.add_scalar(name, value, report.iteration)

    def on_train_end(self, trainer: TrainerView) -> None:
        self._close()

    def on_error(self, trainer: TrainerView, exc: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _add_bars(writer: SummaryWriter, name: str, weights: list[float], iteration: int) -> None:
    """A histogram whose bar i, centered on i, is `weights[i]`: over experts, or over numbers of experts."""
    total = sum(weights)
    if total <= 0:
        return
    writer.add_histogram_raw(
        name,
        min=-0.5,
        max=len(weights) - 0.5,
        num=total,
        sum=sum(i * w for i, w in enumerate(weights)),
        sum_squares=sum(i * i * w for i, w in enumerate(weights)),
        bucket_limits=[i + 0.5 for i in range(len(weights))],
        bucket_counts=list(weights),
        global_step=iteration,
    )
