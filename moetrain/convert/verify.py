"""Proof of an export: the exported folder, loaded by transformers, gives our model's logits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from moetrain.convert.hf import DTYPES, Checkpoint
from moetrain.convert.mapping import Shape
from moetrain.errors import ConversionError

TOLERANCE = 1e-3
"""Largest difference of a logit that counts as equal, both sides in fp32. Two orders of summation over thousands of
terms differ by less; one transposed, swapped or forgotten tensor moves logits by far more."""


@dataclass(frozen=True)
class LogitsReport:
    """`max_abs`: the largest difference; `argmax_agreement`: share of positions whose best token is the same."""

    max_abs: float
    argmax_agreement: float
    positions: int


def hf_logits(
    folder: Path, tokens: Tensor, trust_remote_code: bool = True, loader: Any = AutoModelForCausalLM
) -> Tensor:
    """Logits, fp32 [b, s, V], of an exported folder for tokens, int64 [b, s]. Computed on CPU in fp32, offline.

    With `trust_remote_code` it runs the folder's own Python files, as any user of our exports does. `loader` is the
    class that loads it.
    """
    model = loader.from_pretrained(
        folder, trust_remote_code=trust_remote_code, local_files_only=True, dtype=torch.float32
    )
    with torch.no_grad():
        return model.eval()(tokens, use_cache=False).logits


def compare_logits(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> LogitsReport:
    """Compare [b, s, V] logits. ConversionError when shapes differ, a value is not finite, or one is off by more."""
    if ours.shape != theirs.shape:
        raise ConversionError(f"our logits have shape {list(ours.shape)}, the export's {list(theirs.shape)}")
    if not (ours.isfinite().all() and theirs.isfinite().all()):
        raise ConversionError("logits are not all finite, so that nothing can be compared")
    difference = (ours.double() - theirs.double()).abs()
    agreement = (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
    report = LogitsReport(difference.max().item(), agreement, ours.shape[0] * ours.shape[1])
    if report.max_abs > tolerance:
        place = [int(i) for i in torch.unravel_index(difference.argmax(), difference.shape)]
        raise ConversionError(
            f"the export's logits differ from ours by up to {report.max_abs:.3g} (at [sequence, position, token] "
            f"{place}), tolerance {tolerance:g}; the best token agrees at {agreement:.1%} of {report.positions}"
        )
    return report


class RoundedCheckpoint:
    """A checkpoint whose weights have been through the export's dtype; controllers and the rest are as stored.

    Rounding moves logits by more than any tolerance that would find an error, so both sides must start from the same
    rounded numbers.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self.config = checkpoint.config
        self.step = checkpoint.step
        self.consumed_samples = checkpoint.consumed_samples

    def names(self) -> Iterable[str]:
        return self._checkpoint.names()

    def shape(self, name: str) -> Shape:
        return self._checkpoint.shape(name)

    def read(self, name: str, offset: Shape | None = None, shape: Shape | None = None) -> Tensor:
        """A block (default: all) of a tensor, in its stored dtype."""
        if shape is None:
            shape = self.shape(name)
        if offset is None:
            offset = (0,) * len(shape)
        tensor = self._checkpoint.read(name, offset, shape)
        return tensor.to(self._dtype).to(tensor.dtype) if name.startswith("weight.") else tensor


def verify_export(
    checkpoint: Checkpoint, folder: Path, tolerance: float = TOLERANCE, sequences: int = 2, length: int = 128
) -> LogitsReport:
    """Compare an exported folder with the training model's own logits on random tokens; both models fit in memory.

    Errors: ConversionError above `tolerance`.
    """
    from moetrain.model.reference_logits import (
        megatron_logits,
    )  # imports Megatron: ten seconds that exports need not pay

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    rounded = RoundedCheckpoint(checkpoint, DTYPES[str(config.dtype).removeprefix("torch.")])
    shape = (sequences, min(length, config.max_position_embeddings))
    tokens = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return compare_logits(megatron_logits(rounded, tokens), hf_logits(folder, tokens), tolerance)
