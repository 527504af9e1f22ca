"""Texts with labels for sequence tasks, from .jsonl and .tsv files, as batches that no layout changes."""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy
import torch

from moetrain.config.objectives import ClassifyConfig, RegressConfig
from moetrain.data.tokenizers import Tokenizer
from moetrain.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Examples:
    """Encoded texts and what is to be told of them.

    Attributes:
        ids: token ids of each text, at most seq_length.
        labels: int64 [N] classes, or fp32 [N] scores.
        pad: id in the places after a text.
        seq_length: places of a sample.
        truncated: how many texts were too long and lost their ends.
    """

    ids: list[list[int]]
    labels: torch.Tensor
    pad: int
    seq_length: int
    truncated: int

    def __len__(self) -> int:
        return len(self.ids)

    def sample(self, index: int | None) -> dict[str, torch.Tensor]:
        """The parts of a `MicroBatch` for one text; None gives a row of padding that counts in nothing."""
        tokens = torch.full((self.seq_length,), self.pad, dtype=torch.int64)
        ids = [] if index is None else self.ids[index]
        tokens[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
        return {
            "tokens": tokens,
            "labels": torch.zeros_like(self.labels[0]) if index is None else self.labels[index],
            "weights": torch.tensor(0.0 if index is None else 1.0),
            "valid": torch.arange(self.seq_length) < len(ids),
        }


class ShuffledExamples:
    """`samples` samples of some examples, in a new order each epoch that is a function of (seed, epoch) alone."""

    def __init__(self, examples: Examples, samples: int, seed: int) -> None:
        self._examples, self._samples = examples, samples

        @lru_cache(maxsize=2)
        def order(epoch: int) -> numpy.ndarray:
            # RandomState, because numpy promises that its permutations never change.
            bits = numpy.random.MT19937(numpy.random.SeedSequence([seed, epoch, 0x74657874]))
            return numpy.random.RandomState(bits).permutation(len(examples))

        self._order = order

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        epoch, number = divmod(index, len(self._examples))
        return self._examples.sample(int(self._order(epoch)[number]))


class OrderedExamples:
    """Every example once, in the order of the files, and rows of padding up to whole global batches."""

    def __init__(self, examples: Examples, global_batch_size: int) -> None:
        self.examples = examples
        self.batches = math.ceil(len(examples) / global_batch_size)
        self._samples = self.batches * global_batch_size

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.examples.sample(index if index < len(self.examples) else None)


def read_examples(
    paths: Sequence[Path],
    objective: ClassifyConfig | RegressConfig,
    tokenizer: Tokenizer,
    seq_length: int,
    starts_with_bos: bool,
) -> Examples:
    """Read and encode files, one after another.

    A text becomes `a eod`, a pair `a eod b eod`; with `starts_with_bos` the tokenizer's bos stands in front. Where that
    is longer than `seq_length`, tokens are dropped from the end of the longer text until it fits (as BERT's
    `_truncate_seq_pair` does), and counted.

    Errors: DataError, with file and line, for what cannot be read, a missing key or column, or a label that is no class
    or no finite number; and for files without an example.
    """
    if starts_with_bos and tokenizer.bos is None:
        raise DataError("model.head.pooling (first) pools the beginning-of-text token, and data.tokenizer has none")
    front = [tokenizer.bos] if starts_with_bos and tokenizer.bos is not None else []
    keys = [objective.text] + ([objective.text_pair] if objective.text_pair is not None else [])
    if seq_length < len(front) + 2 * len(keys):
        raise DataError(f"model.seq_length ({seq_length}) has no room for {len(keys)} text(s) and what separates them")
    classes = objective.classes if isinstance(objective, ClassifyConfig) else None
    ids, labels, truncated = [], [], 0
    for path in paths:
        for where, row in _rows(path):
            parts = [tokenizer.encode(_text(row, key, where)) for key in keys]
            room = seq_length - len(front) - len(parts)
            truncated += sum(map(len, parts)) > room
            ids.append(front + [i for part in _shorten(parts, room) for i in (*part, tokenizer.eod)])
            labels.append(_label(_field(row, objective.label, where), classes, where))
    if not ids:
        raise DataError(f"{', '.join(map(str, paths))}: no example")
    if truncated:
        logger.warning("%d of %d texts are longer than model.seq_length (%d)", truncated, len(ids), seq_length)
    pad = tokenizer.pad if tokenizer.pad is not None else tokenizer.eod
    dtype = torch.float32 if classes is None else torch.int64
    return Examples(ids, torch.tensor(labels, dtype=dtype), pad, seq_length, truncated)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, fields) of every example."""
    if path.suffix not in (".jsonl", ".tsv"):
        raise DataError(f"examples {path}: must be a .jsonl file, or a .tsv file whose first line names its columns")
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            if path.suffix == ".jsonl":
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        yield f"{path}:{number}", _object(line, f"{path}:{number}")
                return
            # A quotation mark is a character like any other: GLUE's files hold single ones.
            reader = csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
            for row in reader:
                yield f"{path}:{reader.line_num}", row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"examples {path}: cannot be read ({error})") from error


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: must be a JSON object")
    return row


def _field(row: dict[str, Any], key: str, where: str) -> Any:
    if row.get(key) is None:
        present = ", ".join(str(name) for name, value in row.items() if value is not None)
        raise DataError(f"{where}: has no {key!r} (training.objective names it); it has: {present}")
    return row[key]


def _text(row: dict[str, Any], key: str, where: str) -> str:
    text = _field(row, key, where)
    if not isinstance(text, str):
        raise DataError(f"{where}: {key!r} is {text!r}; must be a text")
    return text


def _label(value: Any, classes: list[str] | None, where: str) -> int | float:
    if classes is not None:
        if str(value) not in classes:
            raise DataError(f"{where}: label {value!r} is none of training.objective.classes: {', '.join(classes)}")
        return classes.index(str(value))
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise DataError(f"{where}: label {value!r} must be a finite number")
    return score


def _shorten(parts: list[list[int]], room: int) -> list[list[int]]:
    """Cut the longest of the parts, the later one of equals, until they fit."""
    lengths = [len(part) for part in parts]
    while sum(lengths) > room:
        longest = max(range(len(parts)), key=lambda i: (lengths[i], i))
        lengths[longest] -= 1
    return [part[:length] for part, length in zip(parts, lengths, strict=True)]
