"""Reads any rectangle of any tensor of a checkpoint folder. Needs no process group and no accelerator."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moetrain.checkpoint.integrity import check_size, check_sum
from moetrain.checkpoint.manifest import DTYPES, Manifest, ShardEntry, TensorEntry
from moetrain.checkpoint.rectangles import Rect, Shape, intersect
from moetrain.errors import CheckpointError

MAX_OPEN_FILES = 64

Verify = Literal["full", "size", "none"]


class CheckpointReader:
    """One committed checkpoint folder.

    Opening checks the manifest, and by `verify` the shard files: "full" their sha256, "size" their presence and
    length, "none" nothing before they are read. Raises CheckpointError. Files are mapped, so only what is asked for
    is read from disk. Not safe for use by several threads at once.
    """

    def __init__(self, folder: Path | str, verify: Verify = "full") -> None:
        if verify not in ("full", "size", "none"):
            raise ValueError(f"verify must be full, size or none, not {verify!r}")
        self.folder = Path(folder)
        self.manifest = Manifest.load(self.folder)
        self._open = lru_cache(maxsize=MAX_OPEN_FILES)(self._open_file)
        self._bounds = lru_cache(maxsize=None)(self._shard_bounds)
        if verify != "none":
            self.verify_files(checksum=verify == "full")

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest.step

    @property
    def consumed_samples(self) -> int:
        """Training sequences consumed."""
        return self.manifest.consumed_samples

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration of the run that saved."""
        return self.manifest.config

    @property
    def layout(self) -> dict[str, Any]:
        """The parallel layout that saved: for people; reading does not depend on it."""
        return self.manifest.layout

    @property
    def extra(self) -> dict[str, Any]:
        """Further JSON that the saver put in."""
        return self.manifest.extra

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self.manifest.record.tensors)

    def files(self) -> list[str]:
        """All shard file names, largest first."""
        files = self.manifest.record.files
        return sorted(files, key=lambda name: (-files[name].bytes, name))

    def shape(self, name: str) -> Shape:
        """Global shape of a tensor. CheckpointError for an unknown name."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor. CheckpointError for an unknown name."""
        return self._entry(name).torch_dtype

    def read(self, name: str, offset: Shape | None = None, shape: Shape | None = None) -> Tensor:
        """A rectangle (default: all) of a tensor, as a new contiguous CPU tensor of the stored dtype."""
        entry = self._entry(name)
        offset = (0,) * len(entry.shape) if offset is None else tuple(offset)
        if shape is None:
            shape = tuple(n - o for n, o in zip(entry.shape, offset, strict=False))
        self._require_inside(name, entry, Rect(offset, tuple(shape)))
        out = torch.empty(shape, dtype=entry.torch_dtype)
        self.read_into(name, offset, out)
        return out

    def read_into(self, name: str, offset: Shape, out: Tensor) -> None:
        """Fill `out` (any device, any strides, the stored dtype) with the rectangle of its shape at `offset`."""
        entry = self._entry(name)
        region = Rect(tuple(offset), tuple(out.shape))
        self._require_inside(name, entry, region)
        if out.dtype != entry.torch_dtype:
            raise CheckpointError(
                f"{self.folder}: tensor {name!r} is stored as {entry.dtype}; asked for as {out.dtype}"
            )
        for shard in self._shards_touching(name, entry, region):
            part = intersect(shard.rect, region)
            if part is not None:
                out[part.slices_from(region.offset)].copy_(self._read_part(shard, entry, part))

    def verify_files(self, names: Iterable[str] | None = None, checksum: bool = True) -> None:
        """Check shard files (default: all) for presence, length and, with `checksum`, sha256.

        CheckpointError names the file, what was expected and what was found. Ranks may each check a part of `files()`.
        """
        for name in self.files() if names is None else names:
            self._require_size(name)
            if checksum:
                check_sum(self.folder / name, self.manifest.record.files[name])

    def close(self) -> None:
        """Unmap all files. Reading again maps them again."""
        self._open.cache_clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self.manifest.record.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.folder}: there is no tensor {name!r} in this checkpoint") from None

    def _require_inside(self, name: str, entry: TensorEntry, region: Rect) -> None:
        if len(region.offset) != len(region.shape) or not region.fits(entry.shape):
            raise CheckpointError(
                f"{self.folder}: tensor {name!r} has shape {list(entry.shape)}; asked for the region at {region}"
            )

    def _shards_touching(self, name: str, entry: TensorEntry, region: Rect) -> Iterable[ShardEntry]:
        """A tensor can lie in thousands of shards, so the search is one vector comparison."""
        low, high = self._bounds(name)
        hits = (low < np.asarray(region.stop)).all(1) & (high > np.asarray(region.offset)).all(1)
        return (entry.shards[i] for i in np.flatnonzero(hits))

    def _shard_bounds(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """First and one-past-last indices of all shards of a tensor, int64 [shards, dims] each."""
        entry = self._entry(name)
        dims = (len(entry.shards), len(entry.shape))
        low = np.array([s.rect.offset for s in entry.shards], dtype=np.int64).reshape(dims)
        high = np.array([s.rect.stop for s in entry.shards], dtype=np.int64).reshape(dims)
        return low, high

    def _read_part(self, shard: ShardEntry, entry: TensorEntry, part: Rect) -> Tensor:
        path = self.folder / shard.file
        try:
            stored = self._open(shard.file).get_slice(shard.key)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: lacks {shard.key!r}, which the manifest lists: {error}") from error
        found = (stored.get_dtype(), tuple(stored.get_shape()))
        expected = (DTYPES[entry.dtype][1], shard.rect.shape)
        if found != expected:
            raise CheckpointError(f"{path}: {shard.key!r} is {found}, the manifest says {expected}")
        return stored[part.slices_from(shard.rect.offset)]

    def _open_file(self, name: str) -> Any:
        # A mapped file that is shorter than its header says would kill the process with SIGBUS, not raise.
        self._require_size(name)
        try:
            return safe_open(self.folder / name, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.folder / name}: damaged, not a safetensors file: {error}") from error

    def _require_size(self, name: str) -> None:
        check_size(self.folder / name, self.manifest.record.files[name].bytes)
