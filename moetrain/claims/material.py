"""The corpus of a laboratory folder: text, tokenizer, and both shares encoded. Made once, by the first study there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moetrain.config.schema import TokenizerConfig
from moetrain.data.corpus import Document, in_hash_order, standard_library_documents, write_corpus
from moetrain.data.documents import check_inputs, read_texts, sample_texts
from moetrain.data.prepare import prepare
from moetrain.data.train_tokenizer import train_sentencepiece
from moetrain.errors import ConfigError

_HELD_OUT_FRACTION = 0.05
_TOKENIZER_SAMPLE_BYTES = 2_000_000


@dataclass(frozen=True)
class Material:
    """Where a laboratory's data lie, and how much there is."""

    tokenizer: Path
    train: Path
    valid: Path
    train_tokens: int
    valid_tokens: int
    source: str


def make_material(folder: Path, corpus: Sequence[Path], vocab_size: int, show_progress: bool) -> Material:
    """The material in `folder`, made from `corpus` (.jsonl or text; none: Python's standard library) where it is
    missing. The tokenizer is trained on training text alone.

    Raises:
        ConfigError: the folder's material was made from something else.
        DataError: a file of the corpus cannot be read.
    """
    wanted = {"corpus": [str(path.resolve()) for path in corpus] or ["standard library"], "vocab_size": vocab_size}
    marker = folder / "material.json"
    if marker.is_file():
        found = json.loads(marker.read_text(encoding="utf-8"))
        if found["made_from"] != wanted:
            raise ConfigError(
                f"{folder} holds data made from {json.dumps(found['made_from'])}, this call wants "
                f"{json.dumps(wanted)}; name another --out"
            )
    else:
        found = {"made_from": wanted, **_make(folder, corpus, vocab_size, show_progress)}
        draft = marker.with_suffix(".partial")
        draft.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        draft.replace(marker)
    return Material(
        tokenizer=folder / "tokenizer.model",
        train=folder / "train",
        valid=folder / "valid",
        train_tokens=found["train_tokens"],
        valid_tokens=found["valid_tokens"],
        source=", ".join(wanted["corpus"]),
    )


def _make(folder: Path, corpus: Sequence[Path], vocab_size: int, show_progress: bool) -> dict[str, int]:
    """Every file of the folder, over what an interrupted attempt left."""
    texts, held_out, tokenizer = folder / "train.jsonl", folder / "valid.jsonl", folder / "tokenizer.model"
    prefixes = (folder / "train", folder / "valid")
    written = [prefix.with_suffix(suffix) for prefix in prefixes for suffix in (".bin", ".idx", ".json")]
    for path in (texts, held_out, tokenizer, *written):
        path.unlink(missing_ok=True)
    documents = in_hash_order(_documents(corpus) if corpus else standard_library_documents())
    write_corpus(documents, texts, held_out, _HELD_OUT_FRACTION, show_progress)
    share = _TOKENIZER_SAMPLE_BYTES / max(check_inputs([texts]), 1)
    sample = sample_texts(read_texts([texts]), share)
    train_sentencepiece(sample, tokenizer.with_suffix(""), vocab_size, mask_token=True)  # some arms are encoders
    settings = TokenizerConfig(type="sentencepiece", path=str(tokenizer))
    train, valid = (
        prepare([source], prefix, settings, show_progress=show_progress).tokens
        for source, prefix in zip((texts, held_out), prefixes, strict=True)
    )
    return {"train_tokens": train, "valid_tokens": valid}


def _documents(corpus: Sequence[Path]) -> Iterator[Document]:
    check_inputs(corpus)
    for path in corpus:
        for text in read_texts([path]):
            if text.strip():
                yield Document(text, path.name)
