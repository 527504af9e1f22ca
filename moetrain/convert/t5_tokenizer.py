"""T5's sentencepiece models as files that say everything: transformers adds 100 pieces to them that the file lacks."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from moetrain.errors import DataError

FILE = "spiece.model"
SENTINELS = 100
"""Pieces <extra_id_99> to <extra_id_0>, which transformers puts behind those of the file."""


def with_sentinels(model: bytes, vocab_size: int, where: str) -> bytes:
    """The model in the file `where` with its sentinels behind the other pieces, the last first, so that they have the
    ids that transformers gives them. A vocabulary with less room gets none."""
    parsed: Any = getattr(sentencepiece_model_pb2, "ModelProto")()  # noqa: B009  (made at run time)
    try:
        parsed.ParseFromString(model)
    except DecodeError as error:
        raise DataError(f"tokenizer {where}: not a sentencepiece model, or a damaged one ({error})") from error
    known = {piece.piece for piece in parsed.pieces}
    if "<extra_id_0>" not in known and len(parsed.pieces) + SENTINELS <= vocab_size:
        for i in reversed(range(SENTINELS)):
            parsed.pieces.add(piece=f"<extra_id_{i}>", score=0.0, type=parsed.SentencePiece.USER_DEFINED)
    return parsed.SerializeToString()
