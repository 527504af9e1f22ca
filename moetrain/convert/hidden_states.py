"""Proof of an imported encoder, which has no logits: its final hidden states are those of transformers."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import SwitchTransformersEncoderModel

from moetrain.checkpoint.reader import CheckpointReader
from moetrain.errors import ConversionError

TOLERANCE = 1e-3
"""Largest difference of a final hidden state, over the largest one, that counts as equal in fp32. Sharp attention makes
more of rounding than a logit's: with a random model of switch-base-8's size our states were 8e-5 from those of
transformers in float64, and its own in fp32 4e-5. One misplaced tensor moves states by far more."""


@dataclass(frozen=True)
class StatesReport:
    """`max_relative`: the largest difference, over the largest state; of real tokens, `positions` in number."""

    max_relative: float
    positions: int


class _AsTransformers:
    """A checkpoint whose dropped tokens get nothing, as in transformers, whatever its config says."""

    def __init__(self, reader: CheckpointReader) -> None:
        self.read = reader.read
        self.config = copy.deepcopy(reader.config)
        moe = self.config["model"]["moe"]
        if moe is not None:
            moe["capacity"]["dropped"] = "zero"


@torch.no_grad()
def compare_states(folder: Path, imported: Path, sequences: int = 2, length: int = 96) -> StatesReport:
    """On random tokens, the last sequence padded, in fp32 on CPU, of a Switch Transformer's folder and our checkpoint.

    Both models must fit in memory, and there must be no process group yet. ConversionError above `TOLERANCE`.
    """
    from moetrain.model.reference_logits import encoder_states  # imports Megatron: seconds that others need not pay

    theirs = SwitchTransformersEncoderModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
    ).eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(theirs.config.vocab_size, (sequences, length), generator=generator)
    lengths = torch.full((sequences, 1), length)
    lengths[-1] -= 7
    valid = torch.arange(length) < lengths
    expected = theirs(input_ids=tokens, attention_mask=valid.long()).last_hidden_state[valid]
    with CheckpointReader(imported) as reader:
        states = encoder_states(_AsTransformers(reader), tokens, valid)[valid]
    report = StatesReport(((states - expected).abs().max() / expected.abs().max()).item(), int(valid.sum()))
    if not report.max_relative <= TOLERANCE:
        raise ConversionError(
            f"hidden states differ from transformers' by up to {report.max_relative:.3g} of the largest one, "
            f"tolerance {TOLERANCE:g}; nothing was written"
        )
    return report
