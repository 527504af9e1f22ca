"""`config.yaml`: the resolved configuration of the run as it goes on."""

from __future__ import annotations

from moetrain.config.loader import dump_yaml
from moetrain.train.callback import Callback, TrainerView
from moetrain.train.callbacks.records import replace_file

FILE = "config.yaml"


class ConfigCallback(Callback):
    """Writes the whole configuration, defaults included, once nothing can be refused any more: a run that may not
    resume leaves the record of the one before it. Rank 0."""

    def on_train_start(self, trainer: TrainerView) -> None:
        if trainer.rank == 0:
            replace_file(trainer.run_dir / FILE, dump_yaml(trainer.config))
