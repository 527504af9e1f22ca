"""Writes one rank's rectangles to safetensors files.

The library's `save_file` wants every tensor in host memory at once and cannot hash what it writes. Writing the
format ourselves (a length, a JSON header, the raw bytes: https://github.com/huggingface/safetensors#format) takes one
tensor at a time from the accelerator and yields the checksum in the same pass. Reading stays with the library.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moetrain.checkpoint.files import OS_FILES, Files, write_all
from moetrain.checkpoint.manifest import (
    DTYPES,
    MAX_DIMS,
    MAX_NAME,
    FileEntry,
    ShardEntry,
    ShardRecord,
    TensorEntry,
    dtype_name,
)
from moetrain.checkpoint.rectangles import Rect, Shape
from moetrain.errors import CheckpointError

# Files are the unit in which ranks share the hashing at load, so they should not be much larger than this.
MAX_FILE_BYTES = 4 * 2**30
# safetensors refuses headers above 100 MB; a name, a dtype, a shape and offsets stay below 800 bytes.
MAX_FILE_PIECES = 100_000
_CHUNK_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Piece:
    """A rectangle of the global tensor `name` that this rank, and no other, stores.

    `tensor` is contiguous, on any device, of the rectangle's shape; its first element is global element `offset`.
    `steady`: it changes in the optimizer's update alone, so a save in the background need not copy it before.
    """

    name: str
    global_shape: Shape
    offset: Shape
    tensor: Tensor
    steady: bool = False

    @classmethod
    def whole(cls, name: str, tensor: Tensor) -> Piece:
        """A tensor that this rank owns entirely (controllers, random-generator states)."""
        return cls(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor)

    @property
    def rect(self) -> Rect:
        """Where in the global tensor it lies."""
        return Rect(tuple(self.offset), tuple(self.tensor.shape))

    @property
    def key(self) -> str:
        """Its name inside the shard file."""
        return f"{self.name}@{','.join(map(str, self.offset))}"


def save_shard(
    folder: Path,
    rank: int,
    pieces: Iterable[Piece],
    max_file_bytes: int = MAX_FILE_BYTES,
    files: Files = OS_FILES,
) -> ShardRecord:
    """Write a rank's pieces to `shard-<rank>.safetensors` (`shard-<rank>-001...` when above `max_file_bytes`).

    On return the files are on disk (fsync). Holds one piece in host memory at a time, and none that already is there.
    No communication. Raises CheckpointError for an ill-formed piece, OSError when the disk refuses; never overwrites.
    """
    owned = _checked(pieces)
    written: dict[str, FileEntry] = {}
    tensors: dict[str, tuple[str, Shape, list[ShardEntry]]] = {}
    for piece in owned:
        tensors.setdefault(piece.name, (dtype_name(piece.tensor.dtype), tuple(piece.global_shape), []))
    for number, batch in enumerate(_batches(owned, max_file_bytes)):
        name = f"shard-{rank:05d}.safetensors" if number == 0 else f"shard-{rank:05d}-{number:03d}.safetensors"
        written[name] = _write_file(folder / name, batch, files)
        for piece in batch:
            tensors[piece.name][2].append(ShardEntry(name, piece.key, piece.rect))
    entries = {name: TensorEntry(dtype, shape, tuple(shards)) for name, (dtype, shape, shards) in tensors.items()}
    return ShardRecord(entries, written)


def _checked(pieces: Iterable[Piece]) -> list[Piece]:
    owned = list(pieces)
    keys: set[str] = set()
    kinds: dict[str, tuple[torch.dtype, Shape]] = {}
    for piece in owned:
        kind = (piece.tensor.dtype, tuple(piece.global_shape))
        if not 0 < len(piece.name) <= MAX_NAME or len(piece.global_shape) > MAX_DIMS:
            raise CheckpointError(
                f"tensor {piece.name!r} of shape {list(piece.global_shape)}: a name has 1 to {MAX_NAME} characters and "
                f"a shape at most {MAX_DIMS} dimensions"
            )
        if not piece.rect.fits(piece.global_shape):
            raise CheckpointError(f"{piece.name!r}: piece at {piece.rect} does not fit {list(piece.global_shape)}")
        if not piece.tensor.is_contiguous():
            raise CheckpointError(f"{piece.name!r}: piece at {piece.rect} is not contiguous")
        if kinds.setdefault(piece.name, kind) != kind:
            raise CheckpointError(f"{piece.name!r}: pieces disagree: {kinds[piece.name]} and {kind} on one rank")
        if piece.tensor.numel() and piece.key in keys:
            raise CheckpointError(f"{piece.name!r}: the piece at {piece.rect} is owned twice by one rank")
        keys.add(piece.key)
    return owned


def _batches(pieces: list[Piece], max_file_bytes: int) -> Iterator[list[Piece]]:
    """Non-empty pieces, a file at a time; wide dtypes first, so that every tensor starts at a multiple of its size."""
    batch: list[Piece] = []
    size = 0
    for piece in sorted((p for p in pieces if p.tensor.numel()), key=lambda p: -p.tensor.dtype.itemsize):
        if batch and (size + piece.tensor.nbytes > max_file_bytes or len(batch) == MAX_FILE_PIECES):
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += piece.tensor.nbytes
    if batch:
        yield batch


def _write_file(path: Path, pieces: list[Piece], files: Files) -> FileEntry:
    digest, size = hashlib.sha256(), 0
    descriptor = files.create(path)
    try:
        with ThreadPoolExecutor(max_workers=1) as hasher:
            for block in _file_blocks(pieces):
                for start in range(0, len(block), _CHUNK_BYTES):
                    chunk = block[start : start + _CHUNK_BYTES]
                    hashed = hasher.submit(digest.update, chunk)
                    write_all(descriptor, chunk, files)
                    hashed.result()
                size += len(block)
        files.sync(descriptor)
    finally:
        files.close(descriptor)
    return FileEntry(size, digest.hexdigest())


def _file_blocks(pieces: list[Piece]) -> Iterator[memoryview]:
    yield memoryview(_header(pieces))
    for piece in pieces:
        flat = piece.tensor.detach().reshape(-1).view(torch.uint8).cpu()
        yield flat.numpy().data


def _header(pieces: list[Piece]) -> bytes:
    table: dict[str, dict] = {}
    position = 0
    for piece in pieces:
        end = position + piece.tensor.nbytes
        dtype = DTYPES[dtype_name(piece.tensor.dtype)][1]
        table[piece.key] = {"dtype": dtype, "shape": list(piece.tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
