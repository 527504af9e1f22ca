"""Writes a safetensors file tensor by tensor, so that memory holds none but the one that is being written.

The library's `save_file` wants all tensors of a file at once, and cannot hash what it writes.
Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moetrain.convert.mapping import Shape

CHUNK_ELEMENTS = 4 * 2**20
_WORDS = {torch.float32: "F32", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Entry:
    """A tensor as it will be in the file."""

    name: str
    dtype: torch.dtype
    shape: Shape

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class WrittenFile:
    """What a finished file is, to the byte."""

    bytes: int
    sha256: str


def write_weight_file(path: Path, entries: list[Entry], tensors: Iterable[tuple[str, Tensor]]) -> WrittenFile:
    """Write `tensors`, which come in the order of `entries`, converted to their dtypes. On return it is on disk.

    Wide dtypes must come first, so that every tensor starts at a multiple of its element's size.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file, ThreadPoolExecutor(max_workers=1) as hasher:
        for block in _blocks(entries, tensors):
            hashed = hasher.submit(digest.update, block)
            file.write(block)
            hashed.result()
        file.flush()
        os.fsync(file.fileno())
        return WrittenFile(file.tell(), digest.hexdigest())


def sha256_of(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _blocks(entries: list[Entry], tensors: Iterable[tuple[str, Tensor]]) -> Iterator[memoryview]:
    yield memoryview(_header(entries))
    stream = iter(tensors)
    for entry in entries:
        name, tensor = next(stream)
        assert (name, tuple(tensor.shape)) == (entry.name, entry.shape), f"{name} comes where {entry.name} is due"
        flat = tensor.reshape(-1)
        for start in range(0, len(flat), CHUNK_ELEMENTS):
            chunk = flat[start : start + CHUNK_ELEMENTS].to(entry.dtype)
            yield chunk.view(torch.uint8).numpy().data
        del tensor, flat


def _header(entries: list[Entry]) -> bytes:
    table: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in entries:
        offsets = [position, position + entry.bytes]
        table[entry.name] = {"dtype": _WORDS[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        position += entry.bytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
