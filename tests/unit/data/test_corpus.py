from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrain.data.corpus import Document, split_by_hash, standard_library_corpus, standard_library_documents
from moetrain.errors import DataError


def _texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_standard_library_gives_megabytes_of_distinct_documents_twice_the_same(tmp_path: Path):
    reports = [standard_library_corpus(tmp_path / f"{n}.jsonl", held_out=tmp_path / f"{n}.held.jsonl") for n in "ab"]
    assert reports[0] == reports[1]
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    train, held_out = _texts(tmp_path / "a.jsonl"), _texts(tmp_path / "a.held.jsonl")
    assert len(train) == reports[0].documents and len(held_out) == reports[0].held_out_documents
    assert sum(len(text.encode()) for text in train) == reports[0].bytes > 5_000_000
    assert max(Counter(train + held_out).values()) == 1


def test_documents_come_from_the_library_and_not_from_installed_packages(tmp_path: Path):
    standard_library_corpus(tmp_path / "c.jsonl")
    sources = [json.loads(line)["source"] for line in (tmp_path / "c.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {"stdlib:json/decoder.py", "builtin:builtins", "topic:assignment"} <= set(sources)
    assert not [source for source in sources if "site-packages" in source or "/test/" in source]


def test_what_a_program_does_to_the_interpreter_does_not_change_the_corpus(monkeypatch: pytest.MonkeyPatch):
    before = list(standard_library_documents())
    monkeypatch.setattr(sys, "excepthook", lambda *_: None)
    assert list(standard_library_documents()) == before


def test_max_bytes_limits_train_and_held_out_text_together(tmp_path: Path):
    report = standard_library_corpus(tmp_path / "c.jsonl", 300_000, tmp_path / "h.jsonl", 0.2)
    assert 250_000 < report.bytes + report.held_out_bytes <= 300_000


def test_outputs_that_exist_are_kept_and_nothing_else_is_written(tmp_path: Path):
    (tmp_path / "h.jsonl").write_text("precious")
    with pytest.raises(DataError, match=r"refusing to overwrite .*h\.jsonl"):
        standard_library_corpus(tmp_path / "c.jsonl", 300_000, tmp_path / "h.jsonl", 0.2)
    assert [path.name for path in tmp_path.iterdir()] == ["h.jsonl"]
    assert (tmp_path / "h.jsonl").read_text() == "precious"


def test_an_empty_held_out_share_is_an_error(tmp_path: Path):
    with pytest.raises(DataError, match=r"h\.jsonl would be empty"):
        standard_library_corpus(tmp_path / "c.jsonl", 300_000, tmp_path / "h.jsonl", 0.0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_a_share_outside_its_range_is_refused(fraction: float):
    with pytest.raises(DataError, match=f"{fraction} must be at least 0 and below 1"):
        split_by_hash([], fraction)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))), st.lists(st.text("ab")), st.floats(0, 0.99))
def test_a_held_out_text_is_held_out_in_every_corpus_that_has_it(one: list[str], more: list[str], fraction: float):
    documents = [Document(text, "one") for text in one]
    train, held_out = split_by_hash(documents, fraction)
    assert sorted(d.text for d in train + held_out) == sorted(one)
    other = [Document(text, "two") for text in reversed(more + one)]
    other_train, other_held_out = split_by_hash(other, fraction)
    assert not {d.text for d in train + other_train} & {d.text for d in held_out + other_held_out}


def test_the_held_out_share_is_about_as_large_as_asked():
    train, held_out = split_by_hash([Document(str(n), "") for n in range(2000)], 0.1)
    assert 150 < len(held_out) < 250 and len(train) + len(held_out) == 2000
