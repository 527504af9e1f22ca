"""Six steps are three steps, a checkpoint, new processes and three more, to the bit on the same layout. What happens on
another one is in test_lattice.py."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from parity import LAYOUTS, SINGLE, Layout, layout_of, run_steps, tiny_config, whole_controllers, whole_weights

from moetrain.checkpoint.comm import TorchDistributed
from moetrain.checkpoint.manager import CheckpointManager
from moetrain.config.loader import config_to_dict
from moetrain.runtime.groups import create_groups
from moetrain.testing import run_distributed
from moetrain.train.setup import build_step
from moetrain.train.state import collect_pieces, restore

BY_NAME = {layout.name: layout for layout in [SINGLE, *LAYOUTS]}
STEPS, HALF = 6, 3


def run_part(layout: Layout, zero: int, tied: bool, folder: Path, first: int, last: int, **changes: object) -> dict:
    """Steps [first, last) of the synthetic run: from `folder`'s checkpoint if first > 0; a checkpoint is left there."""
    config = tiny_config(layout, zero, tied, **changes)
    step = build_step(config, create_groups(layout_of(config), seed=1), torch.device("cpu"))
    manager = CheckpointManager(folder, keep_last=2, comm=TorchDistributed())
    record = {"name": layout.name, "zero": zero}
    if first > 0:
        reader = manager.open()
        assert reader is not None and reader.step == first
        restore(step, reader, record, logging.getLogger("test"))
    losses, norms = run_steps(step, range(first, last))
    manager.save(last, last * 8, collect_pieces(step), config_to_dict(config), record, {"optimizer_steps": last})
    return {
        "losses": losses,
        "norms": norms,
        "weights": whole_weights(step),
        "controllers": whole_controllers(step),
        "rng": torch.get_rng_state(),
    }


def run(layout: str, zero: int, tied: bool, folder: Path, first: int, last: int) -> dict:
    at = BY_NAME[layout]
    return run_distributed(run_part, at.world, at, zero, tied, folder, first, last)[0]


@pytest.mark.parametrize(
    ("layout", "zero", "tied"),
    [
        ("single", 0, False),
        ("dp2", 2, False),
        ("pp2 x ep2", 1, True),
        ("pp2 interleaved", 1, True),
        ("tp2+sp x ep2", 2, False),
        ("tp2+sp x pp2 interleaved x ep2", 0, True),
    ],
)
def test_resume_on_the_same_layout_is_exact_to_the_bit(layout: str, zero: int, tied: bool, tmp_path: Path) -> None:
    whole = run(layout, zero, tied, tmp_path / "whole", 0, STEPS)
    before = run(layout, zero, tied, tmp_path / "parts", 0, HALF)
    after = run(layout, zero, tied, tmp_path / "parts", HALF, STEPS)
    assert before["losses"] + after["losses"] == whole["losses"]
    assert before["norms"] + after["norms"] == whole["norms"]
    assert after["controllers"] == whole["controllers"]
    assert torch.equal(after["rng"], whole["rng"])
    for name, weight in whole["weights"].items():
        assert torch.equal(after["weights"][name], weight), name


def run_biased(layout: Layout, folder: Path, first: int, last: int) -> dict:
    """With controllers that are vectors: a bias per expert, and the loads that the balance loss remembers."""
    router = {"type": "expert_bias", "bias_rate": 0.05}
    changes = {"model__moe__router": router, "model__moe__aux_loss": "global_batch"}
    return run_part(layout, 1, False, folder, first, last, **changes)


def test_controllers_that_are_vectors_resume_on_another_layout(tmp_path: Path) -> None:
    whole = run_distributed(run_biased, 1, SINGLE, tmp_path / "whole", 0, STEPS)[0]
    run_distributed(run_biased, 2, BY_NAME["pp2"], tmp_path / "parts", 0, HALF)
    after = run_distributed(run_biased, 2, BY_NAME["tp2"], tmp_path / "parts", HALF, STEPS)[0]
    assert len(after["controllers"]) == 6
    assert after["controllers"] == whole["controllers"]
    for name, weight in whole["weights"].items():
        assert float((after["weights"][name] - weight).norm() / weight.norm()) <= 1e-5, name
