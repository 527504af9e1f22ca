"""A sentencepiece model as a `tokenizers` pipeline that gives the same ids.

The converters of transformers do not: on models like ours they differ in most texts (byte fallback, whitespace rules,
BPE taken for unigram). The pipeline is therefore built from the ModelProto, rule by rule:

- normalization: compiled character map, whitespace clean-up, dummy prefix, space -> U+2581, in sentencepiece's order;
- unigram: its scores, with reserved pieces (`</s>`, `<0x0A>`) priced out: sentencepiece never finds those in text;
- BPE: sentencepiece merges the adjacent pair whose concatenation scores best, so a pair's rank is that piece's score.

Ids may differ for text with U+2581 itself; under a normalization other than identity, for letters spelled with several
combining characters, which `tokenizers` normalizes cluster by cluster; and, in unigram models, where two segmentations
score the same but for the fp32 rounding of sentencepiece's sums, which `tokenizers` keeps in fp64 (2 to 5 tokens in
100,000 of source code, never in BPE).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from moetrain.errors import ConversionError

SPACE = "\u2581"
# Generated code makes its classes at run time, where type checkers do not see them.
_proto: Any = sentencepiece_model_pb2
_Piece, _Spec = _proto.ModelProto.SentencePiece, _proto.TrainerSpec


@dataclass(frozen=True)
class FastTokenizer:
    """The pipeline, the unknown piece's text, and, for unigram, the score of each id (None for reserved pieces)."""

    tokenizer: Tokenizer
    unknown: str
    scores: tuple[float | None, ...] | None

    def same(self, ids: Sequence[int], others: Sequence[int]) -> bool:
        """Whether two segmentations of a text are equal, or, in a unigram model, too close for fp32 to tell apart."""
        if list(ids) == list(others):
            return True
        scores = self.scores
        if scores is None or _without_score(scores, ids) != _without_score(scores, others):
            return False
        mine, theirs = (math.fsum(scores[i] or 0.0 for i in sequence) for sequence in (ids, others))
        return math.isclose(mine, theirs, rel_tol=1e-5)


def fast_tokenizer(model: bytes, where: str) -> FastTokenizer:
    """Build the pipeline. ConversionError for a model with a feature that `tokenizers` cannot express exactly."""
    parsed = _parse(model, where)
    trainer, normalizer = parsed.trainer_spec, parsed.normalizer_spec
    build = _unigram if trainer.model_type == _Spec.UNIGRAM else _bpe
    tokenizer = Tokenizer(build(parsed))
    tokenizer.normalizer = _normalizer(normalizer)
    if isolated := _letters_of_reserved_pieces_only(parsed):
        pattern = Regex("[" + "".join(re.escape(letter) for letter in isolated) + "]")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    strip = normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if strip else [])
    )
    control = [piece.piece for piece in parsed.pieces if piece.type == _Piece.CONTROL]
    unknown = parsed.pieces[_unknown_id(parsed)].piece
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in [unknown, *control]])
    # Like sentencepiece: "</s>" in a text is five letters, not the end of the document.
    tokenizer.encode_special_tokens = True
    return FastTokenizer(tokenizer, unknown, _scores(parsed) if trainer.model_type == _Spec.UNIGRAM else None)


def _parse(model: bytes, where: str) -> Any:
    parsed = _proto.ModelProto()
    try:
        parsed.ParseFromString(model)
    except DecodeError as error:
        raise ConversionError(f"tokenizer {where}: not a sentencepiece model: {error}") from error
    kinds = {_Spec.UNIGRAM: "unigram", _Spec.BPE: "bpe"}
    kind, types = parsed.trainer_spec.model_type, {piece.type for piece in parsed.pieces}
    problems = {
        "is neither unigram nor bpe": kind not in kinds,
        "marks spaces at the end of words (treat_whitespace_as_suffix)": parsed.trainer_spec.treat_whitespace_as_suffix,
        "keeps spaces as they are (escape_whitespaces: false)": not parsed.normalizer_spec.escape_whitespaces,
        "has unused pieces": _Piece.UNUSED in types,
        "is bpe with user-defined symbols": kind == _Spec.BPE and _Piece.USER_DEFINED in types,
    }
    found = [problem for problem, present in problems.items() if present]
    if found:
        raise ConversionError(
            f"tokenizer {where}: the model {' and '.join(found)}, which a fast tokenizer cannot express exactly"
        )
    return parsed


def _unknown_id(parsed: Any) -> int:
    return next(i for i, piece in enumerate(parsed.pieces) if piece.type == _Piece.UNKNOWN)


def _normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        # Only U+0020: by now the map has turned what it regards as a space into one.
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _found_in_text(piece: Any) -> bool:
    return piece.type in (_Piece.NORMAL, _Piece.USER_DEFINED)


def _letters_of_reserved_pieces_only(parsed: Any) -> list[str]:
    """Characters of reserved pieces that no ordinary piece has.

    Such a character always stands alone in sentencepiece. Cutting the text there keeps a reserved piece from being
    found where its own letters are unknown, which no score could prevent.
    """
    ordinary = {letter for piece in parsed.pieces if _found_in_text(piece) for letter in piece.piece}
    reserved = {letter for piece in parsed.pieces if not _found_in_text(piece) for letter in piece.piece}
    return sorted(reserved - ordinary)


def _scores(parsed: Any) -> tuple[float | None, ...]:
    return tuple(piece.score if piece.type == _Piece.NORMAL else None for piece in parsed.pieces)


def _without_score(scores: tuple[float | None, ...], ids: Sequence[int]) -> list[int]:
    return [i for i in ids if scores[i] is None]


def _unigram(parsed: Any) -> models.Unigram:
    normal = [piece.score for piece in parsed.pieces if piece.type == _Piece.NORMAL]
    best, worst = max(normal), min(normal)
    longest = max(len(piece.piece) for piece in parsed.pieces if not _found_in_text(piece))
    reserved = (longest + 1) * (worst - 10.0)  # below any way to spell it in ordinary pieces

    def score(piece: Any) -> float:
        if piece.type == _Piece.USER_DEFINED:
            return len(piece.piece.encode()) * best - 0.1  # sentencepiece, unigram_model.cc, EncodeOptimized
        return piece.score if piece.type == _Piece.NORMAL else reserved

    vocabulary = [(piece.piece, score(piece)) for piece in parsed.pieces]
    return models.Unigram(vocabulary, _unknown_id(parsed), parsed.trainer_spec.byte_fallback)


def _bpe(parsed: Any) -> models.BPE:
    ids = {piece.piece: i for i, piece in enumerate(parsed.pieces)}
    scores = {piece.piece: piece.score for piece in parsed.pieces if _found_in_text(piece)}
    pairs = [
        (text[:cut], text[cut:])
        for text in scores
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    pairs.sort(key=lambda pair: (-scores[pair[0] + pair[1]], ids[pair[0]], ids[pair[1]]))
    return models.BPE(
        vocab=ids,
        merges=pairs,
        unk_token=parsed.pieces[_unknown_id(parsed)].piece,
        fuse_unk=True,
        byte_fallback=parsed.trainer_spec.byte_fallback,
    )
