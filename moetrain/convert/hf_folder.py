"""A Hugging Face model folder that may come from anybody: its config and its tensors. Nothing in it is executed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from moetrain.convert.mapping import Shape
from moetrain.convert.safetensors_file import SafetensorsFile, StoredTensor, parse_json
from moetrain.errors import ConversionError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_JSON = 256 * 2**20
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.safetensors")


class HFFolder:
    """`config` is config.json as it stands; the tensors are those of model.safetensors or of the files of its index.

    Opening reads the headers and no weights. ConversionError for a folder that is not whole or not honest: weights in
    pickles, files outside the folder, an index that contradicts its files, a tensor twice.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise ConversionError(f"{folder} is no folder; give one with config.json and {WHOLE}")
        self._roots = _roots(folder)
        self.config: dict[str, Any] = parse_json(self._bytes("config.json"), str(folder / "config.json"))
        self._file_of: dict[str, SafetensorsFile] = {}
        for file in self._files():
            self._file_of |= dict.fromkeys(file.tensors, file)

    def names(self) -> Iterable[str]:
        return self._file_of.keys()

    def shape(self, name: str) -> Shape:
        return self.stored(name).shape

    def stored(self, name: str) -> StoredTensor:
        """Dtype, shape and place of a tensor."""
        return self._file_of[name].tensors[name]

    def read(self, name: str, offset: Shape, shape: Shape) -> Tensor:
        """A block of whole rows, in the stored dtype."""
        whole = self.shape(name)
        if shape == whole:
            return self._file_of[name].read(name)
        assert shape[1:] == whole[1:] and not any(offset[1:]), f"{name}: {shape} at {offset} are not rows of {whole}"
        return self._file_of[name].read(name, offset[0], shape[0])

    def has(self, name: str) -> bool:
        """Whether a file is there, in the folder itself or in its place in the Hub's cache."""
        return (self.folder / name).is_file() and self._is_inside(self.folder / name)

    def _files(self) -> list[SafetensorsFile]:
        whole, index = (self.folder / WHOLE).exists(), (self.folder / INDEX).exists()
        if whole and index:
            raise ConversionError(f"{self.folder} has {WHOLE} and {INDEX}; which of them counts? Remove one")
        if whole:
            return [SafetensorsFile(self._path(WHOLE))]
        if not index:
            self._refuse_without_weights()
        return self._indexed_files()

    def _indexed_files(self) -> list[SafetensorsFile]:
        where = str(self.folder / INDEX)
        weight_map = parse_json(self._bytes(INDEX), where).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConversionError(f"{where}: weight_map must name the file of each tensor")
        for name in weight_map.values():
            if not isinstance(name, str) or not _SHARD.fullmatch(name):
                raise ConversionError(f"{where}: {str(name)[:200]!r} must be a .safetensors file of this very folder")
        files = {name: SafetensorsFile(self._path(name)) for name in sorted(set(weight_map.values()))}
        found = Counter(tensor for file in files.values() for tensor in file.tensors)
        for name, times in found.items():
            if times > 1 or name not in weight_map:
                problem = f"in {times} files" if times > 1 else "in a file and not in the index"
                raise ConversionError(f"{where}: the tensor {name[:200]!r} is {problem}")
        for name, file in weight_map.items():
            if name not in files[file].tensors:
                raise ConversionError(f"{where}: {name[:200]!r} is not in {file}, where the index says it is")
        return list(files.values())

    def _refuse_without_weights(self) -> NoReturn:
        pickles = sorted(p.name for p in self.folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles:
            raise ConversionError(
                f"{self.folder} has its weights in {pickles[0]} only: a pickle, which can run code of its author when "
                "it is read. Only safetensors are read; where you trust it, save it as such with transformers"
            )
        raise ConversionError(f"{self.folder} has neither {WHOLE} nor {INDEX}")

    def _bytes(self, name: str) -> bytes:
        path = self._path(name)
        if path.stat().st_size > MAX_JSON:
            raise ConversionError(f"{path} has {path.stat().st_size} bytes; the limit is {MAX_JSON}")
        return path.read_bytes()

    def _path(self, name: str) -> Path:
        path = self.folder / name
        if not self._is_inside(path):
            raise ConversionError(f"{path} is a link out of the folder, to {path.resolve()}")
        if not path.is_file():
            raise ConversionError(f"{path} is not there, or no file")
        return path

    def _is_inside(self, path: Path) -> bool:
        real = path.resolve()
        return any(real.is_relative_to(root) for root in self._roots)


def _roots(folder: Path) -> tuple[Path, ...]:
    """Where the folder's files may lie: in it, or, in the Hub's cache, beside it in `blobs`."""
    real = folder.resolve()
    if real.parent.name == "snapshots":
        return real, real.parent.parent / "blobs"
    return (real,)
