"""Tokenizers behind one small protocol: sentencepiece .model files and Hugging Face tokenizer.json files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from moetrain.config.schema import TokenizerConfig
from moetrain.errors import DataError

MASK_TOKENS = ("<mask>", "[MASK]", "<extra_id_0>")
"""Known names of the token that hides another; the last one is T5's first sentinel."""
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")


class Tokenizer(Protocol):
    """What the rest of the project may know of a tokenizer.

    `vocab_size` is one more than the largest id; `eod` ends a document; `bos`, `pad` and `mask` (which hides a token
    from a masked language model) are None where the tokenizer has none; `fingerprint` is the SHA-256, in hexadecimal,
    of the model file's bytes.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def eod(self) -> int: ...
    @property
    def bos(self) -> int | None: ...
    @property
    def pad(self) -> int | None: ...
    @property
    def mask(self) -> int | None: ...
    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text, no special token added."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids."""
        ...


class SentencePieceTokenizer:
    """A sentencepiece model.

    One that `train_sentencepiece` made gives every text back exactly, but for the character U+2581, which is
    sentencepiece's own mark for a space and comes back as one.
    """

    def __init__(self, model: bytes, where: str = "<bytes>") -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)  # pyright: ignore[reportCallIssue]
        except RuntimeError:
            raise DataError(f"tokenizer {where}: not a sentencepiece model, or a damaged one") from None
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.vocab_size = int(self._processor.vocab_size())
        if self._processor.eos_id() < 0:
            raise DataError(f"tokenizer {where}: has no end-of-sentence piece, so documents could not be told apart")
        self.eod = int(self._processor.eos_id())
        self.bos = _id_or_none(self._processor.bos_id())
        self.pad = _id_or_none(self._processor.pad_id())
        known = (self._processor.piece_to_id(piece) for piece in MASK_TOKENS)
        self.mask = next((int(i) for i in known if i != self._processor.unk_id()), None)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, no special token added."""
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids; control pieces such as the end of a document have none."""
        return self._processor.decode([int(i) for i in ids])


class HuggingFaceTokenizer:
    """A tokenizer.json, run by the `tokenizers` package."""

    def __init__(self, model: bytes, named: dict[str, Any], where: str = "<bytes>") -> None:
        """`named` is a tokenizer_config.json: tokens by role (eos_token, bos_token, pad_token, mask_token), and whether
        their names in a text are text (split_special_tokens)."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(model)
        except Exception as error:  # the package raises nothing more precise
            raise DataError(f"tokenizer {where}: not a tokenizer.json, or a damaged one ({error})") from None
        # A tokenizer.json cannot say this itself: "</s>" in a text is five letters, not the end of the document.
        self._tokenizer.encode_special_tokens = named.get("split_special_tokens") is True
        self.fingerprint = hashlib.sha256(model).hexdigest()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise DataError(f"tokenizer {where}: its vocabulary is empty")
        self.vocab_size = max(vocabulary.values()) + 1
        self.eod = self._end_of_document(vocabulary, _content(named.get("eos_token")), where)
        self.bos = vocabulary.get(_content(named.get("bos_token")) or "")
        self.pad = vocabulary.get(_content(named.get("pad_token")) or "")
        masks = (_content(named.get("mask_token")) or "", *MASK_TOKENS)
        self.mask = next((vocabulary[token] for token in masks if token in vocabulary), None)

    def _end_of_document(self, vocabulary: dict[str, int], eos: str | None, where: str) -> int:
        for token in (eos,) if eos else END_TOKENS:
            if token in vocabulary:
                return vocabulary[token]
        special = [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]
        wanted = f"its eos_token {eos!r} is not in the vocabulary" if eos else f"has none of {', '.join(END_TOKENS)}"
        raise DataError(
            f"tokenizer {where}: cannot tell which token ends a document: {wanted}; name it as eos_token in a "
            f"tokenizer_config.json beside it; special tokens here: {', '.join(special) or 'none'}"
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a text, no special token added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids, special tokens included."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def special_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids that are no text: end of document, and beginning, padding and mask where there are such."""
    return sorted({i for i in (tokenizer.eod, tokenizer.bos, tokenizer.pad, tokenizer.mask) if i is not None})


def load_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Load the tokenizer that a run, or the command line, names.

    Errors: DataError when the file is absent, damaged, of the other kind, or has no token that ends a document.
    """
    path = Path(config.path)
    if config.type == "huggingface" and path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"tokenizer {path}: no such file (data.tokenizer.path, type {config.type})")
    model = path.read_bytes()
    if config.type == "sentencepiece":
        return SentencePieceTokenizer(model, str(path))
    return HuggingFaceTokenizer(model, _named_tokens(path.parent / "tokenizer_config.json"), str(path))


def _named_tokens(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        named = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    if not isinstance(named, dict):
        raise DataError(f"{path}: must hold a JSON object")
    return named


def _content(token: Any) -> str | None:
    """The text of a token, which these files write as a string or as an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _id_or_none(token_id: int) -> int | None:
    return int(token_id) if token_id >= 0 else None
