"""The JSON table of contents of a checkpoint folder: which file holds which rectangle of which tensor.

A manifest from disk is not trusted. Everything that would let it reach outside its folder, allocate without bound,
or leave elements unread is refused here, once, so that the reader can rely on it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from moetrain.checkpoint.rectangles import Rect, Shape, first_fault
from moetrain.errors import CheckpointError

FORMAT = "moetrain-checkpoint"
VERSION = 1
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 512 * 2**20
MAX_DIMS = 8
MAX_NAME = 512

# Ours (torch's word) -> (torch, safetensors' word in a file header).
DTYPES: dict[str, tuple[torch.dtype, str]] = {
    "float64": (torch.float64, "F64"),
    "float32": (torch.float32, "F32"),
    "float16": (torch.float16, "F16"),
    "bfloat16": (torch.bfloat16, "BF16"),
    "float8_e4m3fn": (torch.float8_e4m3fn, "F8_E4M3"),
    "float8_e5m2": (torch.float8_e5m2, "F8_E5M2"),
    "int64": (torch.int64, "I64"),
    "int32": (torch.int32, "I32"),
    "int16": (torch.int16, "I16"),
    "int8": (torch.int8, "I8"),
    "uint8": (torch.uint8, "U8"),
    "bool": (torch.bool, "BOOL"),
}

_FILE_NAME = re.compile(r"shard-\d{5,9}(-\d{3,9})?\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One stored rectangle: tensor `key` of `file` holds the global elements of `rect`."""

    file: str
    key: str
    rect: Rect


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One global tensor and the rectangles that tile it."""

    dtype: str
    shape: Shape
    shards: tuple[ShardEntry, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """torch's object for `dtype`."""
        return DTYPES[self.dtype][0]


@dataclass(frozen=True, slots=True)
class FileEntry:
    """What a shard file must be, to the byte."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardRecord:
    """What one rank wrote; or, merged, what all ranks wrote."""

    tensors: dict[str, TensorEntry]
    files: dict[str, FileEntry]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, in the manifest's own layout."""
        return {
            "tensors": {name: _tensor_to_json(entry) for name, entry in self.tensors.items()},
            "files": {name: {"bytes": f.bytes, "sha256": f.sha256} for name, f in self.files.items()},
        }

    @classmethod
    def from_json(cls, value: dict[str, Any], where: str) -> ShardRecord:
        """The inverse of `to_json`. CheckpointError for anything malformed."""
        files = {
            _file_name(name, where): _parse_file(f, f"{where}: file {name!r}")
            for name, f in _member(value, "files", dict, where).items()
        }
        tensors = {
            name: _parse_tensor(name, entry, files, where)
            for name, entry in _member(value, "tensors", dict, where).items()
        }
        return cls(tensors, files)


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`. Its presence in a folder is what makes that folder a checkpoint."""

    step: int
    consumed_samples: int
    config: dict[str, Any]
    layout: dict[str, Any]
    extra: dict[str, Any]
    record: ShardRecord

    def to_bytes(self) -> bytes:
        """The file's content. CheckpointError when config, layout or extra are not plain finite JSON."""
        head = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "consumed_samples": self.consumed_samples,
            "config": self.config,
            "layout": self.layout,
            "extra": self.extra,
        }
        try:
            data = seal(head | self.record.to_json())
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"config, layout and extra must be plain JSON with finite numbers: {error}"
            ) from error
        if len(data) > MAX_MANIFEST_BYTES:
            raise CheckpointError(f"the manifest would have {len(data)} bytes; the limit is {MAX_MANIFEST_BYTES}")
        return data

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read and check `folder/manifest.json`. CheckpointError says what is wrong with it."""
        path = folder / MANIFEST_NAME
        where = str(path)
        data = _read_regular_file(path)
        _check_seal(data, where)
        value = _parse_json(data, where)
        if value.get("format") != FORMAT or value.get("version") != VERSION:
            _refuse(
                where,
                f"format {value.get('format')!r} version {value.get('version')!r}; "
                f"this program reads {FORMAT!r} version {VERSION}",
            )
        record = ShardRecord.from_json(value, where)
        for name, entry in record.tensors.items():
            check_ownership(name, entry, where)
        _check_backing(record, where)
        return cls(
            step=_count(_member(value, "step", int, where), f"{where}: step"),
            consumed_samples=_count(_member(value, "consumed_samples", int, where), f"{where}: consumed_samples"),
            config=_member(value, "config", dict, where),
            layout=_member(value, "layout", dict, where),
            extra=_member(value, "extra", dict, where),
            record=record,
        )

    def fingerprint(self) -> str:
        """sha256 over the content: ranks compare it to learn whether they look at the same checkpoint."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def seal(value: dict[str, Any]) -> bytes:
    """JSON whose last member `sha256` covers every byte before it, so that a damaged manifest is noticed too.

    It guards against accidents, not against an author: whoever can write the manifest can write its sum.
    """
    body = json.dumps(value, allow_nan=False, separators=(",", ":")).encode()[:-1]
    return body + _seal_of(body)


def _seal_of(body: bytes) -> bytes:
    return f',"sha256":"{hashlib.sha256(body).hexdigest()}"}}\n'.encode()


def merge_records(records: Iterable[ShardRecord]) -> ShardRecord:
    """One record of all ranks' (in rank order). CheckpointError unless every element has exactly one owner."""
    tensors: dict[str, TensorEntry] = {}
    shards: dict[str, list[ShardEntry]] = {}
    files: dict[str, FileEntry] = {}
    for rank, record in enumerate(records):
        for name, entry in record.tensors.items():
            known = tensors.setdefault(name, entry)
            if (known.dtype, known.shape) != (entry.dtype, entry.shape):
                raise CheckpointError(
                    f"ranks disagree on tensor {name!r}: rank {rank} has {entry.dtype} {list(entry.shape)}, "
                    f"a rank before it {known.dtype} {list(known.shape)}"
                )
            shards.setdefault(name, []).extend(entry.shards)
        for name, file in record.files.items():
            if name in files:
                raise CheckpointError(f"two ranks wrote the same file {name!r}; every rank needs its own number")
            files[name] = file
    merged = {name: TensorEntry(t.dtype, t.shape, tuple(shards[name])) for name, t in sorted(tensors.items())}
    for name, entry in merged.items():
        check_ownership(name, entry, "save")
    return ShardRecord(merged, files)


def check_ownership(name: str, entry: TensorEntry, where: str) -> None:
    """CheckpointError unless the shards tile the tensor; it names the first missing or doubly owned region."""
    fault = first_fault(entry.shape, [shard.rect for shard in entry.shards])
    if fault is None:
        return
    region, owners = fault
    told = "no shard" if not owners else " and ".join(entry.shards[i].file for i in owners)
    raise CheckpointError(
        f"{where}: tensor {name!r} of shape {list(entry.shape)}: every element must be owned exactly once, but the "
        f"region at {region} is owned by {told}"
    )


def dtype_name(dtype: torch.dtype) -> str:
    """Our word for a torch dtype. CheckpointError for one that a checkpoint cannot hold."""
    for name, (known, _) in DTYPES.items():
        if known == dtype:
            return name
    raise CheckpointError(f"dtype {dtype} cannot be stored; legal: {', '.join(DTYPES)}")


def _tensor_to_json(entry: TensorEntry) -> dict[str, Any]:
    shards = [
        {"file": s.file, "key": s.key, "offset": list(s.rect.offset), "shape": list(s.rect.shape)} for s in entry.shards
    ]
    return {"dtype": entry.dtype, "shape": list(entry.shape), "shards": shards}


# --- what a manifest from disk has to survive -----------------------------------------------------------------------


def _refuse(where: str, why: str) -> NoReturn:
    raise CheckpointError(f"{where}: {why}")


def _read_regular_file(path: Path) -> bytes:
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            _refuse(str(path), "must be a regular file, not a link, folder or device")
        if status.st_size > MAX_MANIFEST_BYTES:
            _refuse(str(path), f"has {status.st_size} bytes; the limit is {MAX_MANIFEST_BYTES}")
        return path.read_bytes()
    except FileNotFoundError:
        _refuse(str(path), "missing, so the folder is not a (complete) checkpoint")
    except OSError as error:
        _refuse(str(path), f"cannot be read: {error.strerror}")


def _check_seal(data: bytes, where: str) -> None:
    length = len(_seal_of(b""))
    body, found = data[:-length], data[-length:]
    expected = _seal_of(body)
    if found != expected:
        _refuse(where, f"damaged or edited: it ends in {found!r}, its content asks for {expected!r}")


def _parse_json(data: bytes, where: str) -> dict[str, Any]:
    def no_constant(word: str) -> NoReturn:
        raise ValueError(f"{word} is not JSON")

    try:
        value = json.loads(data, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        _refuse(where, f"damaged, not valid JSON: {error}")
    if not isinstance(value, dict):
        _refuse(where, f"must hold a JSON object, not {type(value).__name__}")
    return value


def _member(value: Any, key: str, kind: type, where: str) -> Any:
    """`value[key]`, which must be exactly of this type (so True is no integer)."""
    if not isinstance(value, dict):
        _refuse(where, f"must be a JSON object, not {type(value).__name__}")
    if key not in value:
        _refuse(where, f"lacks {key!r}")
    if type(value[key]) is not kind:
        _refuse(where, f"{key!r} must be of type {kind.__name__}, not {type(value[key]).__name__}")
    return value[key]


def _count(value: int, where: str) -> int:
    if not 0 <= value < 2**63:
        _refuse(where, f"{value} must lie between 0 and 2^63 - 1")
    return value


def _shape(value: list, where: str) -> Shape:
    """A list of sizes or offsets whose product still is an honest 63-bit number of elements."""
    if len(value) > MAX_DIMS or any(type(n) is not int or n < 0 for n in value):
        _refuse(where, f"{str(value)[:200]} must be at most {MAX_DIMS} whole numbers, each at least 0")
    if math.prod(max(n, 1) for n in value) >= 2**63:
        _refuse(where, f"{str(value)[:200]} stands for more than 2^63 elements")
    return tuple(value)


def _file_name(name: str, where: str) -> str:
    if not _FILE_NAME.fullmatch(name):
        _refuse(where, f"file name {name[:200]!r} must look like 'shard-00000.safetensors', without any folder")
    return name


def _parse_file(value: Any, where: str) -> FileEntry:
    digest = _member(value, "sha256", str, where)
    if not _SHA256.fullmatch(digest):
        _refuse(where, f"sha256 {digest[:100]!r} must be 64 lower-case hexadecimal digits")
    return FileEntry(_count(_member(value, "bytes", int, where), where), digest)


def _parse_tensor(name: str, value: Any, files: dict[str, FileEntry], where: str) -> TensorEntry:
    where = f"{where}: tensor {name[:MAX_NAME]!r}"
    if not 0 < len(name) <= MAX_NAME:
        _refuse(where, f"its name must have 1 to {MAX_NAME} characters")
    dtype = _member(value, "dtype", str, where)
    if dtype not in DTYPES:
        _refuse(where, f"dtype {dtype[:100]!r} is unknown; legal: {', '.join(DTYPES)}")
    shape = _shape(_member(value, "shape", list, where), f"{where}: shape")
    shards = tuple(_parse_shard(s, shape, files, where) for s in _member(value, "shards", list, where))
    return TensorEntry(dtype, shape, shards)


def _parse_shard(value: Any, shape: Shape, files: dict[str, FileEntry], where: str) -> ShardEntry:
    file = _member(value, "file", str, where)
    if file not in files:
        _refuse(where, f"lies in {file[:200]!r}, which the manifest does not list under 'files'")
    rect = Rect(
        _shape(_member(value, "offset", list, where), f"{where}: offset of a shard"),
        _shape(_member(value, "shape", list, where), f"{where}: shape of a shard"),
    )
    if not rect.fits(shape) or not rect.numel:
        _refuse(where, f"a shard at {rect} does not fit the tensor's shape {list(shape)}")
    return ShardEntry(file, _member(value, "key", str, where), rect)


def _check_backing(record: ShardRecord, where: str) -> None:
    """No file may be said to hold more than its bytes: with full coverage this bounds every tensor by real storage."""
    claimed = dict.fromkeys(record.files, 0)
    for entry in record.tensors.values():
        for shard in entry.shards:
            claimed[shard.file] += shard.rect.numel * entry.torch_dtype.itemsize
    for name, size in claimed.items():
        if size > record.files[name].bytes:
            _refuse(where, f"file {name!r} has {record.files[name].bytes} bytes but is said to hold {size}")
