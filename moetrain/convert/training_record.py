"""What was trained and how: beside an export as `training.json`, and from there back into a checkpoint.

The weights of an import begin at step 0, and would else have lost their history with their first way home.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from moetrain.config.schema import RunConfig
from moetrain.config.section import Count, NonNegativeFloat, PositiveFloat, PositiveInt, Section
from moetrain.convert.hf_folder import HFFolder
from moetrain.convert.safetensors_file import parse_json
from moetrain.errors import ConversionError

FILE = "training.json"
KEY = "training_record"
"""In `extra` of an imported checkpoint's manifest."""
MAX_BYTES = 2**20

Text = Annotated[str, Field(max_length=1000)]
_Plain = bool | int | float | str | None
_SHOWN = ("model", "parallel", "optimizer", "zero", "training")


class _Part(Section):
    model_config = ConfigDict(allow_inf_nan=False, strict=True)


class Corpus(_Part):
    """One corpus of the blend, by the name of its files alone: no path of the training machine leaves it."""

    name: Text
    weight: PositiveFloat


class Validation(_Part):
    """The last one before the export."""

    iteration: Count
    loss: float


class TrainingRecord(_Part):
    """Facts about a training, as a file that may come from anybody tells them. They describe; nothing is computed by
    them.

    Attributes:
        loss: of the last step's batch, in nats per token; validation: None where there was none.
        layout: of the ranks that made the last checkpoint, in words.
        versions: of the software, by name; empty: not known.
        started_from: name of the checkpoint whose weights the run began with.
        settings: all settings that are no defaults, by dotted path.
    """

    format: Literal[1] = 1
    name: Text
    step: PositiveInt
    planned_steps: PositiveInt
    skipped_steps: Count
    sequences: Count
    sequence_length: PositiveInt
    global_batch_size: PositiveInt
    precision: Text
    learning_rate: PositiveFloat
    schedule: Text
    weight_decay: NonNegativeFloat
    clip_grad: NonNegativeFloat
    seed: Count
    data: Annotated[list[Corpus], Field(max_length=10_000)]
    loss: float | None
    validation: Validation | None
    layout: Text | None
    zero_stage: Count
    versions: dict[Text, Text]
    started_from: Text | None
    settings: dict[Text, _Plain | list[_Plain]]

    def to_json(self) -> str:
        """The file's content."""
        return json.dumps(self.model_dump(), indent=2, ensure_ascii=False) + "\n"


def record_of(
    run: RunConfig, step: int, samples: int, layout: dict[str, Any], extra: dict[str, Any]
) -> TrainingRecord | None:
    """Of a checkpoint, by what its manifest holds; of an imported one what came with it. None: nothing was trained."""
    if step == 0:
        return TrainingRecord.model_validate(extra[KEY]) if KEY in extra else None
    training, optimizer, start = run.training, run.optimizer, run.checkpoint
    return TrainingRecord(
        name=run.run.name,
        step=step,
        planned_steps=training.train_iters,
        skipped_steps=extra.get("skipped_steps", 0),
        sequences=samples,
        sequence_length=run.model.seq_length,
        global_batch_size=training.global_batch_size,
        precision=training.precision,
        learning_rate=optimizer.lr,
        schedule=optimizer.schedule.type,
        weight_decay=optimizer.weight_decay,
        clip_grad=optimizer.clip_grad,
        seed=training.seed,
        data=[Corpus(name=Path(corpus.path).name, weight=corpus.weight) for corpus in run.data.train],
        loss=extra.get("loss"),
        validation=Validation(**extra["evaluation"]) if "evaluation" in extra else None,
        layout=layout.get("description"),
        zero_stage=run.zero.stage,
        versions=extra.get("versions", {}),
        started_from=Path(start.load).name if start.load is not None and start.load_weights_only else None,
        settings=dict(_settings(run)),
    )


def read_record(source: HFFolder) -> tuple[TrainingRecord | None, list[str]]:
    """The record beside an export, and a note where there is one that cannot be understood."""
    if not source.has(FILE):
        return None, []
    path = source.folder / FILE
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConversionError(f"{path} has {path.stat().st_size} bytes; the limit is {MAX_BYTES}")
        return TrainingRecord.model_validate(parse_json(path.read_bytes(), str(path))), []
    except (ConversionError, ValidationError) as error:
        return None, [f"{FILE} stays behind, so that a later export will not tell how it was trained: {error}"[:500]]


def _settings(run: RunConfig) -> Iterator[tuple[str, _Plain | list[_Plain]]]:
    tree = run.model_dump(mode="json", include=set(_SHOWN), exclude_defaults=True)
    if run.model.moe is not None:  # which router's defaults they are
        tree["model"]["moe"].setdefault("router", {})["type"] = run.model.moe.router.type
    tree["data"] = {"split": run.data.split}
    yield from _leaves({name: tree[name] for name in sorted(tree)}, "")


def _leaves(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
