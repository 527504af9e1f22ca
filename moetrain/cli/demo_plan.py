"""What a demo is about to do: its files, its two layouts, the step of the crash. Checked whole before any work."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain.config.layout import check_layout
from moetrain.config.loader import config_to_dict, load_config
from moetrain.config.schema import RunConfig
from moetrain.errors import ConfigError

# Splits the weights, the experts' replicas and the optimizer state in other ways than configs/demo.yaml does.
SECOND_LAYOUT = (
    "parallel.tensor=2",
    "parallel.sequence=true",
    "parallel.pipeline=1",
    "parallel.expert=2",
    "zero.stage=2",
)
HELD_OUT_FRACTION = 0.03
TOKENIZER_SAMPLE_BYTES = 2_000_000


@dataclass(frozen=True)
class Files:
    """Where everything lies. `train` and `valid` are prefixes of a .bin, .idx and .json."""

    root: Path

    @property
    def config(self) -> Path:
        """What both launches are started with; the second adds its layout."""
        return self.root / "config.yaml"

    @property
    def corpus(self) -> Path:
        return self.root / "data" / "corpus.jsonl"

    @property
    def held_out(self) -> Path:
        return self.root / "data" / "held-out.jsonl"

    @property
    def tokenizer(self) -> Path:
        return self.root / "data" / "tokenizer.model"

    @property
    def train(self) -> Path:
        return self.root / "data" / "train"

    @property
    def valid(self) -> Path:
        return self.root / "data" / "valid"

    @property
    def indexed(self) -> tuple[Path, ...]:
        """The files of both prefixes."""
        return tuple(
            prefix.with_suffix(suffix) for prefix in (self.train, self.valid) for suffix in (".bin", ".idx", ".json")
        )

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def metrics(self) -> Path:
        return self.run / "metrics.jsonl"

    @property
    def latest(self) -> Path:
        """Names the newest committed checkpoint."""
        return self.run / "checkpoints" / "latest"

    @property
    def hf(self) -> Path:
        return self.root / "hf"


@dataclass(frozen=True)
class Plan:
    """The run before the crash (`first`) and after it (`second`), killed once step `kill_at` is logged."""

    files: Files
    processes: int
    corpus_bytes: int
    first: RunConfig
    second: RunConfig
    kill_at: int

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that the files in the folder depend on, as JSON values."""
        return {
            "processes": self.processes,
            "corpus_bytes": self.corpus_bytes,
            "config": config_to_dict(self.first),
            "second_layout": list(SECOND_LAYOUT),
        }

    def describe_layout(self, config: RunConfig) -> str:
        """`4 ranks = tensor 2 x ...; ZeRO-2`."""
        sequence = "; sequence parallelism" if config.parallel.sequence else ""
        return f"{check_layout(config, self.processes).describe()}{sequence}; ZeRO-{config.zero.stage}"


def make_plan(
    root: Path, source: Path, overrides: Sequence[str], iters: int | None, processes: int, corpus_bytes: int
) -> Plan:
    """The demo that the command line asks for. `source` is the config file. Raises ConfigError or LayoutError."""
    files = Files(root)
    words = [*overrides, *_scaled(load_config([source], overrides), iters), *_paths(files)]
    first, second = load_config([source], words), load_config([source], [*words, *SECOND_LAYOUT])
    for config in (first, second):
        check_layout(config, processes)
    if not first.training.eval_iters:
        raise ConfigError("training.eval_iters (0) must be at least 1: the demo compares the held-out loss")
    return Plan(files, processes, corpus_bytes, first, second, kill_step(first))


def kill_step(config: RunConfig) -> int:
    """The first logged step from the middle on that has a checkpoint before it and none at it. Raises ConfigError."""
    last, log, save = config.training.train_iters, config.training.log_interval, config.checkpoint.save_interval
    for step in range(last // 2, last):
        if save and step > save and step % log == 0 and step % save:
            return step
    raise ConfigError(
        f"no step from {last // 2} to {last - 1} is logged (training.log_interval {log}) with a checkpoint before it "
        f"(checkpoint.save_interval {save}) and none at it, so there is no moment at which to kill the run"
    )


def _scaled(config: RunConfig, iters: int | None) -> list[str]:
    """Overrides that make the run `iters` steps long, with everything that counts steps in proportion."""
    if iters is None:
        return []
    schedule = config.optimizer.schedule
    counts = {
        "training.log_interval": config.training.log_interval,
        "training.eval_interval": config.training.eval_interval,
        "checkpoint.save_interval": config.checkpoint.save_interval,
        "optimizer.schedule.warmup_iters": schedule.warmup_iters,
        "optimizer.schedule.decay_iters": schedule.decay_iters,
    }
    share = iters / config.training.train_iters
    scaled = [f"{name}={max(1, round(count * share))}" for name, count in counts.items() if count]
    return [f"training.train_iters={iters}", *scaled]


def _paths(files: Files) -> list[str]:
    """Overrides that lead the run to the demo's files."""
    paths = {
        "run.dir": str(files.run),
        "data.tokenizer": {"type": "sentencepiece", "path": str(files.tokenizer)},
        "data.train": [{"path": str(files.train)}],
        "data.valid": [{"path": str(files.valid)}],
    }
    return [f"{name}={json.dumps(value)}" for name, value in paths.items()]
