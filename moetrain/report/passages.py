"""The text that a checkpoint is looked at with: held-out documents of the run, a file, or a prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moetrain.config.schema import BlendEntry, DataConfig
from moetrain.data.index import Index, read_index
from moetrain.data.tokenizers import Tokenizer
from moetrain.errors import DataError, ReportError

MAX_PASSAGES = 64
MAX_TOKENS = 4096
MAX_LENGTH = 256

# Marks that would turn the direction of the text around them.
_BIDI = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C}


@dataclass(frozen=True)
class Passage:
    """A text as the model reads it: ids that begin with the end of the document before, and each token's own text."""

    title: str
    ids: tuple[int, ...]
    pieces: tuple[str, ...]


@dataclass(frozen=True)
class Reading:
    """What is read: `source` says where the passages come from, `left_out` what did not fit, or is empty."""

    source: str
    passages: tuple[Passage, ...]
    left_out: str

    @property
    def tokens(self) -> int:
        """Tokens of all passages."""
        return sum(len(passage.ids) for passage in self.passages)


def read_text(text: str, source: str, tokenizer: Tokenizer, seq_length: int) -> Reading:
    """The paragraphs of a text, which blank lines separate; long ones are cut, and each piece is read by itself.

    Errors: ReportError for a text without a token.
    """
    length = min(seq_length, MAX_LENGTH)
    pieces = []
    for number, paragraph in enumerate(_paragraphs(text), start=1):
        ids = tokenizer.encode(paragraph)
        for start in range(0, len(ids), length - 1):
            place = f", from token {start}" if start else ""
            pieces.append((f"paragraph {number}{place}", ids[start : start + length - 1]))
    if not pieces:
        raise ReportError(f"{source}: holds no text")
    passages = tuple(_within_budget(pieces, tokenizer))
    missing = len(pieces) - len(passages)
    left_out = f"the last {missing} of {len(pieces)} passages (at most {MAX_PASSAGES}, {MAX_TOKENS:,} tokens)"
    return Reading(source, passages, left_out if missing else "")


def read_held_out(data: DataConfig, tokenizer: Tokenizer, seq_length: int) -> Reading:
    """The beginnings of held-out documents, drawn at random, always the same ones.

    Errors: DataError for a corpus that is missing or damaged; ReportError where nothing is held out.
    """
    length = min(seq_length, MAX_LENGTH)
    corpora = [_held_out_share(data, entry) for entry in data.valid or data.train]
    corpora = [(index, first, last) for index, first, last in corpora if last > first]
    if not corpora:
        raise ReportError(
            f"data.valid is empty and data.split ({data.split}) holds nothing out: give --text or --prompt"
        )
    drawn = list(_drawn_documents(corpora, length, tokenizer.eod))
    passages = tuple(_within_budget(drawn, tokenizer))
    total = sum(last - first for _, first, last in corpora)
    where = ", ".join(index.prefix for index, _, _ in corpora)
    return Reading(f"beginnings of {len(passages)} of {total:,} held-out documents ({where})", passages, "")


def _paragraphs(text: str) -> Iterator[str]:
    lines: list[str] = []
    for line in [*text.split("\n"), ""]:
        if line.strip():
            lines.append(line)
        elif lines:
            yield "\n".join(lines)
            lines = []


def _held_out_share(data: DataConfig, entry: BlendEntry) -> tuple[Index, int, int]:
    """The corpus and the range of its held-out documents, cut as the training data is."""
    try:
        index = read_index(entry.path)
    except DataError as error:
        raise DataError(f"{error}; --text or --prompt give other text") from error
    count = len(index.lengths)
    if data.valid:
        return index, 0, count
    train, valid, test = (float(share) for share in data.split.split(","))
    total = train + valid + test
    return index, round(count * train / total), round(count * (train + valid) / total)


def _drawn_documents(
    corpora: Sequence[tuple[Index, int, int]], length: int, eod: int
) -> Iterator[tuple[str, list[int]]]:
    """Titles and ids of documents from all corpora in turn."""
    random = np.random.default_rng(0)
    drawn = [first + random.choice(last - first, min(last - first, 512), replace=False) for _, first, last in corpora]
    for turn in range(max(map(len, drawn))):
        for (index, _, _), numbers in zip(corpora, drawn, strict=True):
            if turn < len(numbers):
                number = int(numbers[turn])
                ids = [int(i) for i in index.sequence(number)[: length - 1]]
                if ids and ids[-1] == eod:
                    ids.pop()
                yield f"document {number:,} of {index.prefix}", ids


def _within_budget(texts: Sequence[tuple[str, list[int]]], tokenizer: Tokenizer) -> Iterator[Passage]:
    """Passages as long as they fit; a document of fewer than two tokens tells nothing."""
    passages = tokens = 0
    for title, ids in texts:
        if len(ids) < 2:
            continue
        passages, tokens = passages + 1, tokens + len(ids) + 1
        if passages > MAX_PASSAGES or tokens > MAX_TOKENS:
            return
        yield Passage(title, (tokenizer.eod, *ids), ("", *piece_texts(tokenizer, ids)))


def piece_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What each token adds to the decoded text. The bytes of a character that is split over tokens count to the last
    of them; tokens without text, such as the end of a document, give "". Characters that would not be seen, or would
    reorder the page, come as visible signs; line ends and tabs stay."""
    texts, shown = [], ""
    for end in range(1, len(ids) + 1):
        decoded = tokenizer.decode(ids[:end])
        whole = decoded.rstrip("\N{REPLACEMENT CHARACTER}")
        # A character that lacks its last bytes decodes to marks of damage, until it is whole.
        added = whole[len(shown) :] if whole.startswith(shown) else ""
        shown = whole if whole.startswith(shown) else shown
        texts.append("".join(map(_visible, added)))
    return texts


def _visible(character: str) -> str:
    code = ord(character)
    if character in "\n\t":
        return character
    if code < 32:
        return chr(0x2400 + code)
    if code == 127:
        return "\N{SYMBOL FOR DELETE}"
    if 128 <= code < 160 or code in _BIDI or 0xD800 <= code < 0xE000:
        return f"<U+{code:04X}>"
    return character
