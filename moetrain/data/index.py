"""Megatron's .bin/.idx files as they lie on the disk: reading the index, and refusing what is damaged or does not fit.

Nothing here imports Megatron, so a login node can look into a corpus at once. Layout of an .idx file, little-endian
(megatron/core/datasets/indexed_dataset.py): magic, version u64 = 1, dtype code u8, sequences u64, document boundaries
u64, then lengths int32, byte offsets int64 (one per sequence each) and boundaries int64.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy
import pydantic

from moetrain.data.tokenizers import Tokenizer
from moetrain.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
SCAN_TOKENS = 1 << 24


class FileRecord(pydantic.BaseModel):
    """Size and SHA-256 of a file."""

    bytes: int
    sha256: str


class Sidecar(pydantic.BaseModel):
    """`<prefix>.json`: what `prepare` wrote, and with which tokenizer."""

    format: str = "moetrain-indexed"
    version: int = 1
    moetrain_version: str
    tokenizer_fingerprint: str
    vocab_size: int
    eod: int
    append_eod: bool
    documents: int
    empty_documents: int
    tokens: int
    max_token: int
    dtype: str
    bin: FileRecord
    idx: FileRecord


@dataclass(frozen=True)
class Index:
    """The index of one prefix. `lengths` [sequences] int32 tokens and `offsets` [sequences] int64 bytes are mapped, not
    loaded; `documents` counts documents, each of one or more sequences."""

    prefix: str
    dtype: numpy.dtype
    lengths: numpy.ndarray
    offsets: numpy.ndarray
    documents: int
    tokens: int

    def sequence(self, number: int) -> numpy.ndarray:
        """Token ids of one sequence, mapped."""
        bin_path, _, _ = paths_of(self.prefix)
        offset, length = int(self.offsets[number]), int(self.lengths[number])
        if length == 0:  # other tools write such, and there is nothing to map
            return numpy.empty(0, self.dtype)
        return numpy.memmap(bin_path, self.dtype, "r", offset, (length,))

    def max_token(self) -> int:
        """The largest token id, by reading the whole .bin."""
        bin_path, _, _ = paths_of(self.prefix)
        tokens = numpy.memmap(bin_path, self.dtype, "r")
        return max(int(tokens[i : i + SCAN_TOKENS].max()) for i in range(0, len(tokens), SCAN_TOKENS))


def paths_of(prefix: str | Path) -> tuple[Path, Path, Path]:
    """The .bin, the .idx and the sidecar of a prefix. Appends, so that a prefix may hold dots."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json")


def read_index(prefix: str | Path) -> Index:
    """Map the index and check it against itself and against the size of the .bin.

    Errors: DataError for a missing, truncated, foreign or inconsistent file, or one without a token.
    """
    bin_path, idx_path, _ = paths_of(prefix)
    for path in (idx_path, bin_path):
        if not path.is_file():
            raise DataError(
                f"corpus {prefix}: {path.name} is missing; `moetrain data prepare` writes .bin and .idx together"
            )
    with idx_path.open("rb") as stream:
        head = stream.read(HEADER.size)
    if not head.startswith(MAGIC):
        raise DataError(f"corpus {prefix}: {idx_path.name} is not a Megatron index (it begins with {head[:9]!r})")
    if len(head) < HEADER.size:
        raise DataError(f"corpus {prefix}: {idx_path.name} ends inside its header ({len(head)} of {HEADER.size} bytes)")
    _, version, code, sequences, boundaries = HEADER.unpack(head)
    if version != 1 or code not in DTYPES:
        raise DataError(
            f"corpus {prefix}: {idx_path.name} has version {version} and dtype code {code}; legal: 1 and {list(DTYPES)}"
        )
    expected = HEADER.size + 12 * sequences + 8 * boundaries
    actual = idx_path.stat().st_size
    if actual < expected:
        raise DataError(
            f"corpus {prefix}: {idx_path.name} is truncated: {actual} bytes, its header announces {expected}"
        )
    if sequences == 0 or boundaries < 2:
        raise DataError(f"corpus {prefix}: holds no document")
    return _checked_against_bin(str(prefix), numpy.dtype(DTYPES[code]), sequences, boundaries)


def _checked_against_bin(prefix: str, dtype: numpy.dtype, sequences: int, boundaries: int) -> Index:
    bin_path, idx_path, _ = paths_of(prefix)
    lengths = numpy.memmap(idx_path, numpy.int32, "r", HEADER.size, (sequences,))
    offsets = numpy.memmap(idx_path, numpy.int64, "r", HEADER.size + 4 * sequences, (sequences,))
    ends = numpy.memmap(idx_path, numpy.int64, "r", HEADER.size + 12 * sequences, (boundaries,))
    tokens = int(lengths.sum(dtype=numpy.int64))
    size = bin_path.stat().st_size
    if size != tokens * dtype.itemsize:
        raise DataError(
            f"corpus {prefix}: {bin_path.name} has {size} bytes, but its index announces {tokens} tokens of "
            f"{dtype.itemsize} bytes = {tokens * dtype.itemsize}: truncated, or not from the same run"
        )
    if tokens == 0:
        raise DataError(f"corpus {prefix}: holds no token")
    last = int(offsets[-1]) + int(lengths[-1]) * dtype.itemsize
    if lengths.min() < 0 or offsets[0] != 0 or last != size or ends[0] != 0 or ends[-1] != sequences:
        raise DataError(f"corpus {prefix}: {idx_path.name} contradicts itself; it is damaged")
    return Index(prefix, dtype, lengths, offsets, boundaries - 1, tokens)


def read_sidecar(prefix: str | Path) -> Sidecar | None:
    """The sidecar, or None for a prefix that another tool wrote.

    Errors: DataError when there is one that cannot be read.
    """
    _, _, path = paths_of(prefix)
    if not path.is_file():
        return None
    try:
        sidecar = Sidecar.model_validate_json(path.read_bytes())
    except pydantic.ValidationError as error:
        raise DataError(f"corpus {prefix}: {path.name} is damaged: {error.errors()[0]['msg']}") from None
    if (sidecar.format, sidecar.version) != ("moetrain-indexed", 1):
        raise DataError(
            f"corpus {prefix}: {path.name} has format {sidecar.format} {sidecar.version}; legal: moetrain-indexed 1"
        )
    return sidecar


def verify_prefix(
    prefix: str | Path,
    tokenizer: Tokenizer | None = None,
    vocab_size: int | None = None,
    scan_tokens: bool = True,
    checksum: bool = False,
) -> tuple[Index, Sidecar | None]:
    """Refuse a corpus that is damaged, or that the tokenizer or the model (`vocab_size` embedding rows) does not fit.

    Without a sidecar the tokenizer cannot be compared, and the largest token id is found by reading the whole .bin,
    unless `scan_tokens` is off. `checksum` compares both files with the sidecar's SHA-256, which reads them whole.

    Errors: DataError.
    """
    index = read_index(prefix)
    sidecar = read_sidecar(prefix)
    if sidecar is not None:
        _check_sidecar(index, sidecar, checksum)
        if tokenizer is not None and tokenizer.fingerprint != sidecar.tokenizer_fingerprint:
            raise DataError(
                f"corpus {prefix}: was made with tokenizer {sidecar.tokenizer_fingerprint[:12]} (vocabulary "
                f"{sidecar.vocab_size}), but the tokenizer given is {tokenizer.fingerprint[:12]} (vocabulary "
                f"{tokenizer.vocab_size})"
            )
    elif checksum:
        raise DataError(
            f"corpus {prefix}: has no sidecar {paths_of(prefix)[2].name}, so there is no checksum to compare"
        )
    if vocab_size is not None:
        top = sidecar.max_token if sidecar else index.max_token() if scan_tokens else -1
        if top >= vocab_size:
            raise DataError(
                f"corpus {prefix}: holds token id {top}; model.vocab_size {vocab_size} allows at most {vocab_size - 1}"
            )
    return index, sidecar


def content_of(index: Index, sidecar: Sidecar | None) -> str:
    """What tells a corpus from another one that takes its place: the SHA-256 of its tokens where `prepare` wrote one,
    else its counts, which cost no reading."""
    counts = f"{index.documents} documents, {index.tokens} tokens"
    return counts if sidecar is None else f"{counts}, SHA-256 {sidecar.bin.sha256[:12]}"


def _check_sidecar(index: Index, sidecar: Sidecar, checksum: bool) -> None:
    bin_path, idx_path, sidecar_path = paths_of(index.prefix)
    told = (sidecar.tokens, sidecar.documents, sidecar.dtype)
    if told != (index.tokens, index.documents, index.dtype.name):
        raise DataError(
            f"corpus {index.prefix}: {sidecar_path.name} tells of (tokens, documents, dtype) {told}, but the index of "
            f"{(index.tokens, index.documents, index.dtype.name)}: files of different runs"
        )
    for path, record in ((bin_path, sidecar.bin), (idx_path, sidecar.idx)):
        if path.stat().st_size != record.bytes:
            raise DataError(
                f"corpus {index.prefix}: {path.name} has {path.stat().st_size} bytes, not the {record.bytes} written"
            )
        if checksum and sha256_of(path) != record.sha256:
            raise DataError(
                f"corpus {index.prefix}: {path.name} does not have the SHA-256 of the file that was written"
            )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
