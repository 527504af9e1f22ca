"""Import of stock models, and their way back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stock_models import KINDS, save_stock

from moetrain.checkpoint import CheckpointReader
from moetrain.config.size import parameter_count
from moetrain.convert.from_hf import import_hf
from moetrain.model.reference_logits import megatron_logits

QUIET: Callable[[str], None] = lambda _: None  # noqa: E731


def logits_of(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    with CheckpointReader(folder) as reader:
        return megatron_logits(reader, tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_an_imported_model_has_the_logits_of_transformers(kind: str, tmp_path: Path) -> None:
    theirs = save_stock(kind, tmp_path / "hf")
    report = import_hf(tmp_path / "hf", tmp_path / "out", announce=QUIET)
    tokens = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits
    difference = (logits_of(tmp_path / "out", tokens) - expected).abs().max().item()
    assert expected.std() > 0.1
    assert difference < 1e-5
    assert report.parameters == parameter_count(report.model).total == sum(p.numel() for p in theirs.parameters())
