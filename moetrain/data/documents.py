"""Reading documents out of .jsonl and .txt files, in blocks that a process can take away and parse."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moetrain.errors import DataError

SUFFIXES = (".jsonl", ".txt")
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Block:
    """Consecutive undecoded documents of one file, each with the 1-based line on which it begins."""

    path: str
    is_json: bool
    items: tuple[tuple[int, bytes], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of input in this block."""
        return sum(len(raw) for _, raw in self.items)


def check_inputs(paths: Sequence[Path]) -> int:
    """Refuse inputs that are absent or of an unknown kind; return their bytes together.

    Errors: DataError.
    """
    if not paths:
        raise DataError("no input given: name at least one .jsonl or .txt file")
    for path in paths:
        if path.suffix not in SUFFIXES:
            raise DataError(
                f"input {path}: unknown kind {path.suffix or '(no suffix)'!r}; legal: {', '.join(SUFFIXES)}"
            )
        if not path.is_file():
            raise DataError(f"input {path}: no such file")
    return sum(path.stat().st_size for path in paths)


def read_blocks(paths: Sequence[Path], paragraphs: bool = False, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """Blocks of about `block_bytes`, in the order of the files and of the documents in them.

    A .jsonl file has one document per line; blank lines are passed over. A .txt file is one document, or with
    `paragraphs` one per run of lines between blank lines. Memory: one block, or one document where that is larger.
    """
    for path in paths:
        is_json = path.suffix == ".jsonl"
        with path.open("rb") as stream:
            if is_json:
                items = ((number, line) for number, line in enumerate(stream, 1) if line.strip())
            elif paragraphs:
                items = _paragraphs(stream)
            else:
                items = iter([(1, stream.read())])
            for group in _groups(items, block_bytes):
                yield Block(str(path), is_json, group)


def parse_block(block: Block, json_key: str) -> list[str]:
    """The texts of a block, empty ones included.

    Errors: DataError with file and line for bytes that are not UTF-8, a line that is not a JSON object, and a document
    without text under `json_key`.
    """
    return [_parse(raw, f"{block.path}:{line}", json_key if block.is_json else None) for line, raw in block.items]


def read_texts(paths: Sequence[Path], json_key: str = "text") -> Iterator[str]:
    """All documents of some files, one after another, in this process."""
    for block in read_blocks(paths):
        yield from parse_block(block, json_key)


def sample_texts(texts: Iterable[str], share: float) -> Iterator[str]:
    """About this share of the texts; whether a text is among them depends on the text alone."""
    return (text for text in texts if hash_share(text, "sample") < share)


def hash_share(text: str, purpose: str) -> float:
    """A number in [0, 1) that the text decides, independent between purposes."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8, person=purpose.encode("ascii"))
    return int.from_bytes(digest.digest(), "big") / 2**64


def _parse(raw: bytes, where: str, json_key: str | None) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 (byte 0x{raw[error.start]:02x} at offset {error.start} of the document)"
        ) from None
    if json_key is None:
        return text
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(record, dict):
        raise DataError(
            f"{where}: is a JSON {type(record).__name__}; each line must be an object with the key {json_key!r}"
        )
    if not isinstance(record.get(json_key), str):
        keys = ", ".join(map(repr, record)) or "none"
        raise DataError(f"{where}: no text under the key {json_key!r}; keys here: {keys}")
    document = record[json_key]
    try:
        document.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: holds half of a surrogate pair (character {error.start}), which is not text"
        ) from None
    return document


def _paragraphs(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Runs of non-blank lines, with the number of their first line."""
    start, run = 0, []
    for number, line in enumerate(lines, 1):
        if line.strip():
            start = start if run else number
            run.append(line)
        elif run:
            yield start, b"".join(run)
            run = []
    if run:
        yield start, b"".join(run)


def _groups(items: Iterable[tuple[int, bytes]], block_bytes: int) -> Iterator[tuple[tuple[int, bytes], ...]]:
    group: list[tuple[int, bytes]] = []
    size = 0
    for item in items:
        group.append(item)
        size += len(item[1])
        if size >= block_bytes:
            yield tuple(group)
            group, size = [], 0
    if group:
        yield tuple(group)
