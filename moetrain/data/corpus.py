"""A corpus that every Python installation carries, and the split that keeps held-out documents out of training.

The standard library's sources, the documentation of its compiled modules and the topics of `help()`: about ten
megabytes of text that need no download, enough to see a small language model learn.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import pydoc_data.topics
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moetrain.data.atomic import staged
from moetrain.data.documents import hash_share
from moetrain.data.progress import Meter
from moetrain.errors import DataError

# Installed packages are not the standard library; tests and code tables are not prose or code that anyone writes;
# pydoc_data is read as topics instead.
SKIPPED_FOLDERS = frozenset(
    ("site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__")
)


@dataclass(frozen=True)
class Document:
    """One text and where it comes from."""

    text: str
    source: str


@dataclass(frozen=True)
class CorpusReport:
    """How much was written. Bytes are of UTF-8 text, without JSON's quotes."""

    documents: int
    bytes: int
    held_out_documents: int
    held_out_bytes: int


def standard_library_corpus(
    out: Path,
    max_bytes: int | None = None,
    held_out: Path | None = None,
    held_out_fraction: float = 0.02,
    show_progress: bool = False,
) -> CorpusReport:
    """Write the corpus as .jsonl lines {"text", "source"}; with `held_out`, a share of them goes there instead.

    The same installation always gives the same bytes. Documents are unique by content and come in the order of their
    hashes, so the first megabytes are a fair sample of the whole. `max_bytes` limits the text of both together.

    Errors: DataError when an output exists, when this Python has no sources, or when a share comes out empty.
    """
    documents = _fill(in_hash_order(standard_library_documents()), max_bytes)
    return write_corpus(documents, out, held_out, held_out_fraction, show_progress)


def write_corpus(
    documents: Sequence[Document],
    out: Path,
    held_out: Path | None = None,
    held_out_fraction: float = 0.02,
    show_progress: bool = False,
) -> CorpusReport:
    """Write documents as .jsonl, a share of them (see `split_by_hash`) to `held_out` where that is given.

    Errors: DataError when an output exists or a share comes out empty.
    """
    train, kept_back = split_by_hash(documents, held_out_fraction if held_out else 0.0)
    shares = [(out.resolve(), train)] + ([(held_out.resolve(), kept_back)] if held_out else [])
    for path, share in shares:
        if not share:
            raise DataError(f"{path} would be empty: {len(documents)} documents, held-out share {held_out_fraction}")
        if path.parent != shares[0][0].parent:
            raise DataError(f"held-out file {path} must lie in the same folder as {out}")
    total, total_held_out = sum(map(_nbytes, documents)), sum(map(_nbytes, kept_back))
    with staged(*(path for path, _ in shares)) as drafts, Meter("corpus", total, show_progress) as meter:
        for draft, (_, share) in zip(drafts, shares, strict=True):
            write_jsonl(draft, share, meter)
    return CorpusReport(len(train), total - total_held_out, len(kept_back), total_held_out)


def standard_library_documents() -> Iterator[Document]:
    """Sources, then documentation of compiled modules, then help topics; each part in the order of names."""
    yield from _sources(Path(sysconfig.get_paths()["stdlib"]))
    for name in sorted(sys.builtin_module_names):
        if text := _docstrings(name):
            yield Document(text, f"builtin:{name}")
    for topic, text in sorted(pydoc_data.topics.topics.items()):
        yield Document(text, f"topic:{topic}")


def split_by_hash(documents: Iterable[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """(train, held out). Where a document goes depends on its text alone, so no later corpus, order or worker count can
    move it across, and a text that occurs twice is on one side. About `fraction` of the documents are held out.

    Errors: DataError for a fraction outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise DataError(f"held-out share {fraction} must be at least 0 and below 1")
    train: list[Document] = []
    held_out: list[Document] = []
    for document in documents:
        (held_out if hash_share(document.text, "held-out") < fraction else train).append(document)
    return train, held_out


def in_hash_order(documents: Iterable[Document]) -> list[Document]:
    """Each distinct text once, from its first source, ordered by hash."""
    unique: dict[str, Document] = {}
    for document in documents:
        unique.setdefault(hashlib.sha256(document.text.encode("utf-8")).hexdigest(), document)
    return [unique[key] for key in sorted(unique)]


def write_jsonl(path: Path, documents: Iterable[Document], meter: Meter) -> None:
    """One JSON object a line."""
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        for document in documents:
            stream.write(json.dumps({"text": document.text, "source": document.source}, ensure_ascii=False) + "\n")
            meter.advance(_nbytes(document))


def _nbytes(document: Document) -> int:
    return len(document.text.encode("utf-8"))


def _fill(documents: list[Document], max_bytes: int | None) -> list[Document]:
    """The documents that fit, in order; one that would not fit is passed over."""
    if not documents:
        raise DataError("this Python installation carries no standard-library text")
    if max_bytes is None:
        return documents
    chosen: list[Document] = []
    room = max_bytes
    for document in documents:
        if (size := _nbytes(document)) <= room:
            chosen.append(document)
            room -= size
    if not chosen:
        raise DataError(f"no document fits into {max_bytes} bytes; the smallest has {min(map(_nbytes, documents))}")
    return chosen


def _sources(root: Path) -> Iterator[Document]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in SKIPPED_FOLDERS)
        for name in sorted(files):
            if not name.endswith(".py"):
                continue
            path = Path(folder, name)
            try:
                with tokenize.open(path) as stream:
                    text = stream.read()
            except (SyntaxError, UnicodeDecodeError, OSError):
                continue  # some installations ship files that are wrong on purpose, or unreadable ones
            if text.strip():
                yield Document(text, f"stdlib:{path.relative_to(root).as_posix()}")


def _docstrings(module_name: str) -> str:
    """What a compiled module says about itself: only documentation, because values differ between machines."""
    module = importlib.import_module(module_name)
    parts = [_entry(module_name, module)]
    for name, member in sorted(vars(module).items()):
        if name.endswith("hook"):  # programs replace those of sys, and would get another corpus
            continue
        if inspect.isclass(member) and member.__module__ == module_name:
            parts.append(_entry(f"{module_name}.{name}", member))
            methods = sorted((key, value) for key, value in vars(member).items() if callable(value))
            parts.extend(_entry(f"{module_name}.{name}.{key}", value) for key, value in methods)
        elif inspect.isbuiltin(member) and member.__module__ == module_name:
            parts.append(_entry(f"{module_name}.{name}", member))
    return "\n\n".join(filter(None, parts))


def _entry(name: str, thing: object) -> str:
    documentation = getattr(thing, "__doc__", None)
    return (
        f"{name}\n{inspect.cleandoc(documentation)}" if isinstance(documentation, str) and documentation.strip() else ""
    )
