"""Real text into passages: which, how long, and what each token looks like."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from moetrain.config.schema import DataConfig
from moetrain.data.index import HEADER, MAGIC
from moetrain.errors import DataError, ReportError
from moetrain.report.passages import MAX_PASSAGES, MAX_TOKENS, piece_texts, read_held_out, read_text

EOD = 256


class ByteTokenizer:
    """A token is a byte of UTF-8, so characters beyond ASCII are split over tokens."""

    vocab_size, eod, bos, pad, fingerprint = 257, EOD, None, None, "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i != EOD).decode(errors="replace")


TOKENIZER = ByteTokenizer()


def corpus(prefix: Path, documents: list[list[int]]) -> None:
    """Megatron's .bin and .idx."""
    lengths = np.array([len(d) for d in documents], dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64) * 2]).astype(np.int64)
    Path(f"{prefix}.bin").write_bytes(np.concatenate(documents).astype(np.uint16).tobytes())
    header = HEADER.pack(MAGIC, 1, 8, len(documents), len(documents) + 1)
    bounds = np.arange(len(documents) + 1, dtype=np.int64)
    Path(f"{prefix}.idx").write_bytes(header + lengths.tobytes() + offsets.tobytes() + bounds.tobytes())


def data(tmp_path: Path, valid: bool, split: str = "50,25,25") -> DataConfig:
    entry = [{"path": str(tmp_path / "corpus")}]
    tree = {"tokenizer": {"path": "x"}, "train": [{"path": "other"}] if valid else entry, "split": split}
    return DataConfig.model_validate(tree | {"valid": entry if valid else []})


def test_pieces_join_to_the_text_and_a_split_character_belongs_to_its_last_token() -> None:
    text = "a é\N{GRINNING FACE}\tz\n"
    pieces = piece_texts(TOKENIZER, TOKENIZER.encode(text))
    assert "".join(pieces) == text
    assert pieces == ["a", " ", "", "é", "", "", "", "\N{GRINNING FACE}", "\t", "z", "\n"]


def test_what_cannot_be_seen_or_would_reorder_the_page_is_shown_as_a_sign() -> None:
    text = "\x00\x1b\x7f\x9b\N{RIGHT-TO-LEFT OVERRIDE}x"
    assert "".join(piece_texts(TOKENIZER, TOKENIZER.encode(text))) == "␀␛␡<U+009B><U+202E>x"


def test_tokens_without_text_have_none_and_damaged_bytes_do_not_shift_the_rest() -> None:
    assert piece_texts(TOKENIZER, [EOD, *b"ab", EOD]) == ["", "a", "b", ""]
    assert piece_texts(TOKENIZER, [0xFF, *b"ab"])[1:] == ["\N{REPLACEMENT CHARACTER}a", "b"]


def test_blank_lines_part_passages_and_long_ones_are_cut() -> None:
    reading = read_text("one\ntwo\n\n \nthree" + "e" * 40, "here", TOKENIZER, seq_length=32)
    assert [p.title for p in reading.passages] == ["paragraph 1", "paragraph 2", "paragraph 2, from token 31"]
    assert all(p.ids[0] == EOD and p.pieces[0] == "" and len(p.ids) == len(p.pieces) <= 32 for p in reading.passages)
    assert "".join(reading.passages[0].pieces) == "one\ntwo"
    assert reading.left_out == "" and reading.tokens == 8 + 32 + 15


def test_a_text_that_is_too_long_says_what_was_left_out() -> None:
    reading = read_text("\n\n".join(["word"] * 100), "here", TOKENIZER, 64)
    assert len(reading.passages) == MAX_PASSAGES
    assert reading.left_out.startswith("the last 36 of 100 passages")
    long = read_text("x" * 9000, "here", TOKENIZER, 256)
    assert 0 < long.tokens <= MAX_TOKENS and long.left_out


def test_a_text_without_a_word_is_refused() -> None:
    for text in ("", " \n\n\t\n"):
        with pytest.raises(ReportError, match="here: holds no text"):
            read_text(text, "here", TOKENIZER, 32)


def test_held_out_text_is_that_of_the_validation_corpus(tmp_path: Path) -> None:
    corpus(tmp_path / "corpus", [[*f"document {i}".encode(), EOD] for i in range(6)])
    reading = read_held_out(data(tmp_path, valid=True), TOKENIZER, 32)
    assert sorted("".join(p.pieces) for p in reading.passages) == [f"document {i}" for i in range(6)]
    assert all(p.ids.count(EOD) == 1 for p in reading.passages)
    assert reading == read_held_out(data(tmp_path, valid=True), TOKENIZER, 32)


def test_without_a_validation_corpus_it_is_the_share_that_training_does_not_see(tmp_path: Path) -> None:
    corpus(tmp_path / "corpus", [[*f"document {i}".encode(), EOD] for i in range(8)])
    reading = read_held_out(data(tmp_path, valid=False), TOKENIZER, 32)
    assert sorted("".join(p.pieces) for p in reading.passages) == ["document 4", "document 5"]


def test_where_nothing_is_held_out_other_text_is_asked_for(tmp_path: Path) -> None:
    corpus(tmp_path / "corpus", [[1, 2, EOD]])
    with pytest.raises(ReportError, match=r"data\.split \(1,0,0\) holds nothing out: give --text or --prompt"):
        read_held_out(data(tmp_path, valid=False, split="1,0,0"), TOKENIZER, 32)


def test_a_missing_corpus_is_named_with_a_way_on(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"corpus\.idx is missing.*--text or --prompt"):
        read_held_out(data(tmp_path, valid=True), TOKENIZER, 32)
