"""One safetensors file that may come from anybody, read block by block.

The library maps files, so that what was read counts as this process's memory until the kernel wants it back. Reading
through a descriptor holds the block and nothing else, and lets us check the header ourselves: everything that would
make a reader look outside the file, allocate without bound, or pick one of two readings is refused at once.
Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from moetrain.errors import ConversionError

MAX_HEADER = 100_000_000  # the library's own limit
MAX_DIMS = 8
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""Of weights. Integers mean quantization, which is not ours to undo; 8-bit floats need scales (`block_scales`)."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file; `start` counts bytes from the beginning of the file."""

    dtype: torch.dtype
    shape: Shape
    start: int

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """ConversionError, with the file's name, for anything that is not as it should be."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(MAX_HEADER, size - 8):
                    self._refuse(f"no safetensors file: its header would have {length} bytes, the file has {size}")
                text = file.read(length)
        except OSError as error:
            self._refuse(f"cannot be read: {error.strerror}")
        self.tensors = self._parse(text, 8 + length, size)

    def read(self, name: str, first: int = 0, rows: int | None = None) -> Tensor:
        """A tensor, or `rows` of its first dimension from `first` on, in its stored dtype."""
        entry = self.tensors[name]
        shape = entry.shape if rows is None else (rows, *entry.shape[1:])
        out = torch.empty(shape, dtype=entry.dtype)
        buffer = out.reshape(-1).view(torch.uint8).numpy().data
        row = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        with self.path.open("rb", buffering=0) as file:
            file.seek(entry.start + first * row)
            done = 0
            while done < len(buffer):
                count = file.readinto(buffer[done:])
                if not count:
                    self._refuse(f"ends before {name} does")
                done += count
        return out

    def _parse(self, text: bytes, data: int, size: int) -> dict[str, StoredTensor]:
        header = parse_json(text, str(self.path))
        header.pop("__metadata__", None)
        found = {name: self._entry(name, value, data) for name, value in header.items()}
        position = data
        for name, entry in sorted(found.items(), key=lambda item: (item[1].start, item[1].bytes)):
            if entry.start != position:
                self._refuse(f"{name[:200]} starts at byte {entry.start}, the tensor before it ends at {position}")
            position += entry.bytes
        if position != size:
            self._refuse(f"its tensors end at byte {position}, the file has {size}")
        return found

    def _entry(self, name: str, value: Any, data: int) -> StoredTensor:
        told = f"{name[:200]}: {json.dumps(value)[:200]}"
        if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
            self._refuse(f"{told} must have dtype, shape and data_offsets")
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            self._refuse(f"{told}: a dtype that is not read; legal: {', '.join(DTYPES)}")
        if not _whole_numbers(shape) or len(shape) > MAX_DIMS or not _whole_numbers(offsets) or len(offsets) != 2:
            self._refuse(f"{told}: shape and data_offsets must be whole numbers, at most {MAX_DIMS} and just 2 of them")
        if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
            self._refuse(f"{told}: the shape needs other data_offsets")
        return StoredTensor(DTYPES[dtype], tuple(shape), data + offsets[0])

    def _refuse(self, why: str) -> NoReturn:
        raise ConversionError(f"{self.path}: {why}")


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object without a name twice. ConversionError for anything else."""
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{where}: damaged, not valid JSON: {str(error)[:300]}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{where}: must hold a JSON object, not {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name[:200]!r} stands there twice")
        found[name] = value
    return found


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)
