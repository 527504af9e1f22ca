"""A run that starts from an upcycled checkpoint goes on, on every layout, with the loss that the dense run had."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import (
    LAYOUTS,
    SINGLE,
    Layout,
    Trajectory,
    differences,
    layout_of,
    run_steps,
    tiny_config,
    whole_controllers,
    whole_weights,
)

from moetrain.checkpoint import CheckpointManager, CheckpointReader, TorchDistributed
from moetrain.config.loader import config_to_dict
from moetrain.config.schema import RunConfig
from moetrain.convert.upcycle import upcycle
from moetrain.errors import CheckpointError
from moetrain.runtime.groups import create_groups
from moetrain.testing import run_distributed
from moetrain.train.setup import build_step
from moetrain.train.state import collect_pieces, restore, restore_weights

BY_NAME = {layout.name: layout for layout in LAYOUTS}
LOG = logging.getLogger("test")
TRAINED = 3
# At Adam's default of 1e-8 the first step of weights that start at zero would be a whole one for a gradient that is
# nothing but rounding.
EPS = 1e-6


def dense_config() -> RunConfig:
    return tiny_config(SINGLE, model__moe=None, optimizer__eps=EPS)


def target_config(layout: Layout, zero: int) -> RunConfig:
    """HyperMoE and DA-MoE at once, in three of four layers."""
    router = {"type": "da_moe", "importance": "self_weight", "mean_k": 2.0, "gates": "renormalized"}
    return tiny_config(layout, zero, model__moe__ffn_hidden_size=48, model__moe__router=router, optimizer__eps=EPS)


def train_dense(folder: Path) -> float:
    """Leaves a checkpoint after `TRAINED` steps; returns the loss of the step after it."""
    config = dense_config()
    step = build_step(config, create_groups(layout_of(config), seed=1), torch.device("cpu"))
    run_steps(step, range(TRAINED))
    manager = CheckpointManager(folder / "checkpoints", keep_last=2, comm=TorchDistributed())
    manager.save(TRAINED, 8 * TRAINED, collect_pieces(step), config_to_dict(config), {}, {"optimizer_steps": TRAINED})
    return run_steps(step, range(TRAINED, TRAINED + 1))[0][0]


def train_upcycled(config: RunConfig, folder: Path) -> Trajectory:
    step = build_step(config, create_groups(layout_of(config), seed=1), torch.device("cpu"))
    with CheckpointReader(folder) as reader:
        restore_weights(step, reader, LOG)
    losses, norms = run_steps(step, range(TRAINED, TRAINED + 3))
    return Trajectory(losses, norms, whole_weights(step), whole_controllers(step))


def resume(config: RunConfig, folder: Path) -> str:
    step = build_step(config, create_groups(layout_of(config), seed=1), torch.device("cpu"))
    with CheckpointReader(folder) as reader, pytest.raises(CheckpointError) as error:
        restore(step, reader, {}, LOG)
    return str(error.value)


@pytest.fixture(scope="module")
def upcycled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder, loss that the dense run has next, trajectory of one process from the folder)."""
    root = tmp_path_factory.mktemp("upcycle")
    loss = run_distributed(train_dense, 1, root / "dense")[0]
    (source,) = (root / "dense" / "checkpoints").glob("step-*")
    with CheckpointReader(source) as reader:
        upcycle(reader, target_config(SINGLE, 0), root / "moe", announce=lambda _: None)
    reference = run_distributed(train_upcycled, 1, target_config(SINGLE, 0), root / "moe")[0]
    return root / "moe", loss, reference


def test_the_first_loss_is_the_one_that_the_dense_run_has_next(upcycled: Any) -> None:
    _, loss, reference = upcycled
    assert reference.losses[0] == pytest.approx(loss, rel=1e-6)
    assert abs(reference.losses[1] - loss) > 1e-4  # the next one is not: loss is not a constant of the batch


@pytest.mark.parametrize(("name", "zero"), [("tp2+sp x ep2", 2), ("pp2 x ep2", 1)])
def test_every_layout_goes_on_as_one_process_does(name: str, zero: int, upcycled: Any) -> None:
    folder, loss, reference = upcycled
    layout = BY_NAME[name]
    run = run_distributed(train_upcycled, layout.world, target_config(layout, zero), folder)[0]
    assert run.losses[0] == pytest.approx(loss, rel=1e-6)
    assert run.controllers == reference.controllers
    assert max(differences(run, reference)) <= 1e-5


def test_a_checkpoint_of_weights_alone_is_no_place_to_resume_from(upcycled: Any) -> None:
    message = run_distributed(partial(resume, target_config(SINGLE, 0)), 1, upcycled[0])[0]
    assert "holds weights and no optimizer state" in message and "load_weights_only=true" in message
