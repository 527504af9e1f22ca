"""Examples from files: what they become, what is refused, and who reads which."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moetrain.config.objectives import ClassifyConfig, RegressConfig
from moetrain.data.examples import Examples, OrderedExamples, ShuffledExamples, read_examples
from moetrain.data.tokenizers import SentencePieceTokenizer
from moetrain.errors import DataError

CLASSES = ClassifyConfig(classes=["no", "yes"])
PAIRS = RegressConfig(text="a", text_pair="b", label="score")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_text_ends_with_eod_and_the_rest_is_padding(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    path = write(tmp_path / "x.jsonl", [{"text": "alpha", "label": "yes"}, {"text": "beta gamma", "label": "no"}])
    examples = read_examples([path, path], CLASSES, tokenizer, 30, starts_with_bos=False)
    assert len(examples) == 4
    assert examples.labels.tolist() == [1, 0, 1, 0]
    sample = examples.sample(1)
    ids = [*tokenizer.encode("beta gamma"), tokenizer.eod]
    assert sample["tokens"].tolist() == ids + [tokenizer.pad] * (30 - len(ids))
    assert sample["valid"].tolist() == [True] * len(ids) + [False] * (30 - len(ids))
    assert float(sample["weights"]) == 1.0


def test_of_a_pair_the_longer_text_is_cut_first_and_the_cut_is_counted(
    tmp_path: Path, tokenizer: SentencePieceTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "x.jsonl", [{"a": "alpha " * 20, "b": "beta", "score": "2.5"}])
    examples = read_examples([path], PAIRS, tokenizer, 12, starts_with_bos=True)
    b = tokenizer.encode("beta")
    a = tokenizer.encode("alpha " * 20)[: 12 - 3 - len(b)]
    assert examples.ids == [[tokenizer.bos, *a, tokenizer.eod, *b, tokenizer.eod]]
    assert examples.labels.tolist() == [2.5]
    assert examples.truncated == 1
    assert "1 of 1 texts are longer" in caplog.text


def test_a_tsv_is_read_by_the_names_of_its_columns_and_keeps_quotation_marks(
    tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    path = tmp_path / "x.tsv"
    path.write_text('id\ttext\tlabel\n7\tsaid "so\tyes\n8\tplain\tno\n', encoding="utf-8")
    examples = read_examples([path], CLASSES, tokenizer, 30, starts_with_bos=False)
    assert tokenizer.decode(examples.ids[0]) == 'said "so'
    assert examples.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "content", "objective", "words"),
    [
        ("x.csv", "", CLASSES, "must be a .jsonl file, or a .tsv file"),
        ("x.jsonl", "{", CLASSES, "x.jsonl:1: not JSON"),
        ("x.jsonl", "[1]", CLASSES, "x.jsonl:1: must be a JSON object"),
        ("x.jsonl", '{"text": 3, "label": "no"}', CLASSES, "'text' is 3; must be a text"),
        (
            "x.jsonl",
            '{"text": "a", "label": "maybe"}',
            CLASSES,
            "'maybe' is none of training.objective.classes: no",
        ),
        ("x.jsonl", '{"text": "a"}', CLASSES, "has no 'label' (training.objective names it); it has: text"),
        ("x.jsonl", '{"a": "a", "b": "b", "score": "NaN"}', PAIRS, "label 'NaN' must be a finite number"),
        ("x.jsonl", "\n", CLASSES, "no example"),
        ("x.tsv", "text\tlabel\nonly text\n", CLASSES, "x.tsv:2: has no 'label'"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_place(
    name: str, content: str, objective: Any, words: str, tmp_path: Path, tokenizer: SentencePieceTokenizer
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_examples([tmp_path / name], objective, tokenizer, 30, starts_with_bos=False)
    assert words in str(caught.value)


def test_a_file_that_is_not_there_is_told(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_examples([tmp_path / "gone.jsonl"], CLASSES, tokenizer, 30, starts_with_bos=False)


def numbered(count: int) -> Examples:
    return Examples([[i + 1] for i in range(count)], torch.arange(count), 0, 4, 0)


def test_each_epoch_reads_every_example_once_in_its_own_order() -> None:
    shuffled = ShuffledExamples(numbered(7), 20, seed=3)
    order = [int(shuffled[i]["labels"]) for i in range(len(shuffled))]
    assert sorted(order[:7]) == sorted(order[7:14]) == list(range(7))
    assert order[:7] != order[7:14]
    longer = ShuffledExamples(numbered(7), 200, seed=3)
    assert [int(longer[i]["labels"]) for i in reversed(range(20))] == order[::-1]
    assert [int(ShuffledExamples(numbered(7), 7, seed=4)[i]["labels"]) for i in range(7)] != order[:7]


def test_validation_reads_all_in_order_and_fills_the_last_batch_with_rows_that_do_not_count() -> None:
    ordered = OrderedExamples(numbered(5), global_batch_size=4)
    assert (ordered.batches, len(ordered)) == (2, 8)
    rows = [ordered[i] for i in range(8)]
    assert [int(row["labels"]) for row in rows[:5]] == list(range(5))
    assert [float(row["weights"]) for row in rows] == [1.0] * 5 + [0.0] * 3
    assert not any(bool(row["valid"].any()) for row in rows[5:])
