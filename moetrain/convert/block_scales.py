"""Matrices in fp8 with an fp32 scale for each block, as DeepSeek-V3 is published (README_WEIGHTS.md there)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from moetrain.convert.hf_folder import HFFolder
from moetrain.convert.mapping import Shape
from moetrain.errors import ConversionError

BLOCK = (128, 128)
_SUFFIX = "_scale_inv"
_LEGAL = {"quant_method": ("fp8",), "fmt": ("e4m3", None), "weight_block_size": (list(BLOCK),)}


def has_block_scales(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says so. ConversionError for every other quantization."""
    told = config.get("quantization_config")
    if not told:
        return False
    known = isinstance(told, dict) and all(told.get(name) in legal for name, legal in _LEGAL.items())
    if not known:
        raise ConversionError(
            "config.json: quantization_config: weights quantized like this are not read; legal: none, or fp8 in e4m3 "
            f"with weight_block_size {list(BLOCK)}"
        )
    return True


class BlockScaledWeights:
    """A folder's tensors with what its scales say: `<name>_scale_inv`, of shape [rows / 128, columns / 128] rounded up,
    multiplies `<name>` block by block. ConversionError where fp8 and scales do not go together."""

    def __init__(self, source: HFFolder) -> None:
        self._source = source
        in_fp8 = {name for name in source.names() if source.stored(name).dtype == torch.float8_e4m3fn}
        scales = {name for name in source.names() if name.endswith(_SUFFIX)}
        has_block_scales(source.config)
        for name in sorted(in_fp8 ^ {scale.removesuffix(_SUFFIX) for scale in scales}):
            lacks = f"is in fp8 without {name}{_SUFFIX}" if name in in_fp8 else f"has a {_SUFFIX} and is not in fp8"
            raise ConversionError(f"{name} {lacks}")
        if in_fp8 and not has_block_scales(source.config):
            raise ConversionError(f"{min(in_fp8)} is in fp8, and config.json has no quantization_config")
        for name in in_fp8:
            self._require_whole_blocks(name)
        self.scaled = in_fp8

    def names(self) -> Iterable[str]:
        return (name for name in self._source.names() if not name.endswith(_SUFFIX))

    def shape(self, name: str) -> Shape:
        return self._source.shape(name)

    def read(self, name: str, offset: Shape, shape: Shape) -> Tensor:
        """In fp32, as masters are."""
        block = self._source.read(name, offset, shape).float()
        if name not in self.scaled:
            return block
        first, rows = offset[0], shape[0]
        scales_of_blocks = self._source.read(name + _SUFFIX, (0, 0), self._source.shape(name + _SUFFIX)).float()
        by_row = scales_of_blocks[torch.arange(first, first + rows) // BLOCK[0]]
        return block * by_row.repeat_interleave(BLOCK[1], dim=1)[:, : shape[1]]

    def _require_whole_blocks(self, name: str) -> None:
        shape, scales = self.shape(name), self._source.stored(name + _SUFFIX)
        expected = tuple(-(-size // block) for size, block in zip(shape, BLOCK, strict=False))
        if len(shape) != 2 or scales.shape != expected or scales.dtype != torch.float32:
            raise ConversionError(
                f"{name}{_SUFFIX} is {str(scales.dtype).removeprefix('torch.')} {list(scales.shape)}; must be float32 "
                f"{list(expected)}, for a matrix {list(shape)} in fp8"
            )
