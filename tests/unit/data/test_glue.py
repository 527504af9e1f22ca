"""GLUE's own columns become examples of one form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moetrain.data.glue import GLUE, check_task, convert_part, find_tasks
from moetrain.errors import DataError

# The first lines of GLUE's files, as its download has them, and one example of each.
LINES = {
    "CoLA": (None, 'gj04\t0\t*\tHe said "so.'),
    "SST-2": ("sentence\tlabel", "a fine film\t1"),
    "MRPC": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t70\t71\tA is B.\tB is A."),
    "STS-B": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tmain\tx\t2012\t1\tn\tn\tA plane.\tA jet.\t3.800",
    ),
    "QQP": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\tWhy?\tHow come?\t1"),
    "MNLI": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
        "sentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\t1\t1e\tx\tb\tb\tp\tp\tIt rains.\tIt is dry.\tneutral\tcontradiction",
    ),
    "QNLI": ("index\tquestion\tsentence\tlabel", "0\tWho?\tHe did.\tentailment"),
    "RTE": ("index\tsentence1\tsentence2\tlabel", "0\tA.\tB.\tnot_entailment"),
    "WNLI": ("index\tsentence1\tsentence2\tlabel", "0\tA.\tB.\t1"),
}


@pytest.mark.parametrize("name", GLUE)
def test_every_task_is_read_by_its_own_columns(name: str, tmp_path: Path) -> None:
    task, (header, line) = GLUE[name], LINES[name]
    (tmp_path / name).mkdir()
    for part in ("train", *task.dev):
        lines = ([header] if header else []) + [line, line + "\tone more", "half a line"]
        (tmp_path / name / f"{part}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert find_tasks(tmp_path) == [task]
    check_task(tmp_path, task)
    for part in ("train", *task.dev):
        converted = convert_part(tmp_path, task, part, tmp_path)
        assert (converted.examples, converted.skipped) == (2, 1)
        row = json.loads(converted.path.read_text().splitlines()[0])
        columns = dict(zip((header.split("\t") if header else task.header or ()), line.split("\t"), strict=True))
        texts = [row["text"], row["text_pair"]] if "text_pair" in row else [row["text"]]
        assert texts == [columns[key] for key in task.texts]
        assert row["label"] == columns[task.label]
        assert task.classes == () or row["label"] in task.classes


def test_jsonl_with_plain_keys_is_read_too_and_a_label_that_is_none_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "RTE").mkdir()
    rows = [{"sentence1": "a", "sentence2": "b", "label": label} for label in ("entailment", "hidden", None)]
    (tmp_path / "RTE" / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    converted = convert_part(tmp_path, GLUE["RTE"], "dev", tmp_path)
    assert (converted.examples, converted.skipped) == (1, 2)
    assert json.loads(converted.path.read_text()) == {"text": "a", "text_pair": "b", "label": "entailment"}


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no folder of a GLUE task; known: CoLA, SST-2"):
        find_tasks(tmp_path)
    (tmp_path / "SST-2").mkdir()
    (tmp_path / "SST-2" / "train.tsv").write_text("text\tlabel\n", encoding="utf-8")
    with pytest.raises(DataError, match="has neither dev"):
        check_task(tmp_path, GLUE["SST-2"])
    with pytest.raises(DataError, match="names no column sentence"):
        convert_part(tmp_path, GLUE["SST-2"], "train", tmp_path)
