"""GLUE's folders (arXiv 1804.07461), each with columns of its own, as examples of one form."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain.data.atomic import staged
from moetrain.errors import DataError


@dataclass(frozen=True)
class GlueTask:
    """A task as its files are: which columns hold what, and how it is judged.

    Attributes:
        name: of the task and of its folder.
        texts: columns of the one text, or of the two.
        label: column of the label.
        classes: labels as they stand in the files; empty: a score.
        metrics: names of the official measures, as in `train/scores.py`; F1 is of the second class.
        dev: the parts that are judged, in the order of the report.
        header: column names of files that have no first line with them.
    """

    name: str
    texts: tuple[str, ...]
    label: str
    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    dev: tuple[str, ...] = ("dev",)
    header: tuple[str, ...] | None = None


_PAIR, _BINARY, _ENTAILMENT = ("sentence1", "sentence2"), ("0", "1"), ("not_entailment", "entailment")
GLUE = {
    task.name: task
    for task in (
        GlueTask(
            "CoLA",
            ("sentence",),
            "label",
            _BINARY,
            ("matthews_correlation",),
            header=("source", "label", "mark", "sentence"),
        ),
        GlueTask("SST-2", ("sentence",), "label", _BINARY, ("accuracy",)),
        GlueTask("MRPC", ("#1 String", "#2 String"), "Quality", _BINARY, ("accuracy", "f1")),
        GlueTask("STS-B", _PAIR, "score", (), ("pearson", "spearman")),
        GlueTask("QQP", ("question1", "question2"), "is_duplicate", _BINARY, ("accuracy", "f1")),
        GlueTask(
            "MNLI",
            _PAIR,
            "gold_label",
            ("contradiction", "neutral", "entailment"),
            ("accuracy",),
            dev=("dev_matched", "dev_mismatched"),
        ),
        GlueTask("QNLI", ("question", "sentence"), "label", _ENTAILMENT, ("accuracy",)),
        GlueTask("RTE", _PAIR, "label", _ENTAILMENT, ("accuracy",)),
        GlueTask("WNLI", _PAIR, "label", _BINARY, ("accuracy",)),
    )
}


@dataclass(frozen=True)
class Converted:
    """A part of a task as `<out>/<part>.jsonl`, with keys `text` (and `text_pair`) and `label`. `skipped` lines had
    missing columns or a label that is none: GLUE's own files hold a few."""

    path: Path
    examples: int
    skipped: int


def find_tasks(folder: Path) -> list[GlueTask]:
    """The tasks whose folders are there, in GLUE's order.

    Errors: DataError when there is none.
    """
    found = [task for name, task in GLUE.items() if (folder / name).is_dir()]
    if not found:
        raise DataError(f"{folder}: holds no folder of a GLUE task; known: {', '.join(GLUE)}")
    return found


def check_task(folder: Path, task: GlueTask) -> None:
    """Whether every part is there. Errors: DataError."""
    for part in ("train", *task.dev):
        _source(folder, task, part)


def convert_part(folder: Path, task: GlueTask, part: str, out: Path) -> Converted:
    """Write one part, `train` or one of `task.dev`, into the folder `out`, from `<part>.tsv`, or from `<part>.jsonl`
    with the keys sentence, or sentence1 and sentence2, and label.

    Errors: DataError when the file is missing, cannot be read, or holds no example.
    """
    source = _source(folder, task, part)
    rows = _from_jsonl(source, task) if source.suffix == ".jsonl" else _from_tsv(source, task)
    path = out / f"{part}.jsonl"
    path.unlink(missing_ok=True)
    examples = skipped = 0
    with staged(path.resolve()) as (draft,), draft.open("w", encoding="utf-8") as stream:
        for row in rows:
            if row is None:
                skipped += 1
                continue
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            examples += 1
        if not examples:
            raise DataError(f"{source}: no line has {', '.join((*task.texts, task.label))} of {task.name}")
    return Converted(path, examples, skipped)


def _source(folder: Path, task: GlueTask, part: str) -> Path:
    for suffix in (".tsv", ".jsonl"):
        path = folder / task.name / f"{part}{suffix}"
        if path.is_file():
            return path
    raise DataError(f"{folder / task.name}: has neither {part}.tsv nor {part}.jsonl")


def _from_tsv(path: Path, task: GlueTask) -> Iterator[dict[str, Any] | None]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            # A quotation mark is a character like any other: GLUE's files hold single ones.
            reader = csv.DictReader(stream, task.header, delimiter="\t", quoting=csv.QUOTE_NONE)
            wanted = (*task.texts, task.label)
            if missing := [name for name in wanted if name not in (reader.fieldnames or ())]:
                raise DataError(f"{path}: its first line names no column {', '.join(missing)}")
            for row in reader:
                yield _example([row[name] for name in task.texts], row[task.label], task)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _from_jsonl(path: Path, task: GlueTask) -> Iterator[dict[str, Any] | None]:
    keys = ("sentence",) if len(task.texts) == 1 else _PAIR
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            row = json.loads(line)
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: must be a JSON object")
            yield _example([row.get(key) for key in keys], row.get("label"), task)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _example(texts: list[Any], label: Any, task: GlueTask) -> dict[str, Any] | None:
    """One example, or None for a line that is not whole."""
    if label is None or not all(isinstance(text, str) and text for text in texts):
        return None
    if task.classes and str(label) not in task.classes:
        return None
    if not task.classes and not _is_number(label):
        return None
    pair = {"text_pair": texts[1]} if len(texts) == 2 else {}
    return {"text": texts[0], **pair, "label": str(label)}


def _is_number(label: Any) -> bool:
    try:
        return float(label) == float(label)
    except (TypeError, ValueError):
        return False
