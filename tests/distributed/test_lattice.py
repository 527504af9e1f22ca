"""The lattice: a checkpoint of every layout, loaded on every layout, goes on as the uninterrupted run would have.

Tests take some of the pairs; `make lattice-table` takes all of them and writes docs/reference/resume-lattice.md.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import LAYOUTS, SINGLE, Layout, layout_of, run_steps, tiny_config, whole_controllers, whole_weights

from moetrain.checkpoint.comm import TorchDistributed
from moetrain.checkpoint.manager import CheckpointManager
from moetrain.config.loader import config_to_dict
from moetrain.runtime.groups import ParallelGroups, create_groups
from moetrain.testing import run_distributed
from moetrain.train.setup import build_step
from moetrain.train.state import collect_pieces, restore
from moetrain.train.step import TrainStep

BOUND = 1e-5
SAVED_AT, AFTER, AFTER_ON_THE_SAME = 3, 5, 20
TABLE = Path(__file__).parents[2] / "docs" / "reference" / "resume-lattice.md"
ALL_PAIRS = os.environ.get("MOETRAIN_WRITE_TABLES") == "1"

# The ZeRO stage of each layout, so that stages change as well on the way from one to another.
ZERO = {
    "single": 0,
    "dp2": 2,
    "tp2": 0,
    "tp2+sp": 1,
    "pp2": 2,
    "pp2 interleaved": 1,
    "ep2": 1,
    "ep4": 0,
    "ep2 of dp4": 2,
    "pp2 x ep2": 1,
    "tp2 x ep2": 0,
    "tp2+sp x ep2": 2,
    "tp2+sp x pp2 x ep2": 1,
    "tp2+sp x pp2 interleaved x ep2": 2,
}
BY_NAME = {layout.name: layout for layout in [SINGLE, *LAYOUTS]}
SOURCES = tuple(ZERO) if ALL_PAIRS else ("single", "pp2 x ep2", "tp2+sp x ep2")
TARGETS = (
    tuple(ZERO)
    if ALL_PAIRS
    else ("single", "dp2", "tp2", "tp2+sp x ep2", "pp2 interleaved", "ep4", "tp2+sp x pp2 x ep2")
)
_measured: dict[tuple[str, str], tuple[float, float]] = {}


@dataclass(frozen=True)
class Steps:
    """What some steps gave: losses and gradient norms, and at their end weights and controllers of the whole model."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]
    controllers: dict[str, Any]


def save_on(layout: Layout, folder: Path, last: int) -> Steps:
    """All of a run from the start to `last`, which leaves a checkpoint of step `SAVED_AT` in passing."""
    step = _step(layout, _groups(layout))
    losses, norms = run_steps(step, range(SAVED_AT))
    manager = CheckpointManager(folder, keep_last=1, comm=TorchDistributed())
    extra = {"optimizer_steps": SAVED_AT}
    manager.save(SAVED_AT, SAVED_AT * 8, collect_pieces(step), config_to_dict(step.config), _record(layout), extra)
    return _go_on(step, last, losses, norms)


def load_on(layout: Layout, folders: dict[str, Path], lasts: dict[str, int]) -> dict[str, Steps]:
    """From the checkpoint of each source on to the source's last step, one source after the other."""
    groups = _groups(layout)
    return {source: _load(layout, groups, folder, lasts[source]) for source, folder in folders.items()}


def _load(layout: Layout, groups: ParallelGroups, folder: Path, last: int) -> Steps:
    step = _step(layout, groups)
    reader = CheckpointManager(folder, keep_last=1, comm=TorchDistributed()).open()
    assert reader is not None and reader.step == SAVED_AT
    with reader:
        restore(step, reader, _record(layout), logging.getLogger("test"))
    return _go_on(step, last, [], [])


def _go_on(step: TrainStep, last: int, losses: list[float], norms: list[float]) -> Steps:
    more = run_steps(step, range(SAVED_AT, last))
    return Steps(losses + more[0], norms + more[1], whole_weights(step), whole_controllers(step))


def _groups(layout: Layout) -> ParallelGroups:
    return create_groups(layout_of(tiny_config(layout)), seed=1)


def _step(layout: Layout, groups: ParallelGroups) -> TrainStep:
    return build_step(tiny_config(layout, ZERO[layout.name], tied=True), groups, torch.device("cpu"))


def _record(layout: Layout) -> dict[str, Any]:
    return {"name": layout.name, "zero": ZERO[layout.name]}


@pytest.fixture(scope="module")
def lattice(tmp_path_factory: pytest.TempPathFactory):
    """Trains and loads what is asked for, each layout once in each role."""
    root = tmp_path_factory.mktemp("lattice")
    sources = {name: root / f"{number:02d}" for number, name in enumerate(SOURCES)}

    @lru_cache
    def saved(name: str) -> Steps:
        last = SAVED_AT + (AFTER_ON_THE_SAME if name in TARGETS else AFTER)
        layout = BY_NAME[name]
        return run_distributed(save_on, layout.world, layout, sources[name], last)[0]

    @lru_cache
    def whole() -> Steps:
        """One process, uninterrupted."""
        return run_distributed(save_on, 1, SINGLE, root / "whole", SAVED_AT + AFTER)[0]

    @lru_cache
    def loaded(name: str) -> dict[str, Steps]:
        for source in SOURCES:
            saved(source)
        lasts = {source: SAVED_AT + (AFTER_ON_THE_SAME if source == name else AFTER) for source in SOURCES}
        layout = BY_NAME[name]
        return run_distributed(load_on, layout.world, layout, sources, lasts)[0]

    return saved, whole, loaded


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("target", TARGETS)
def test_a_checkpoint_of_any_layout_goes_on_on_any_other(source: str, target: str, lattice: Any) -> None:
    _, whole, loaded = lattice
    run, reference = loaded(target)[source], whole()
    pairs = [
        [abs(mine - theirs) / abs(theirs) for mine, theirs in zip(ours, all_of_them[SAVED_AT:], strict=False)]
        for ours, all_of_them in ((run.losses, reference.losses), (run.norms, reference.norms))
    ]
    assert len(pairs[0]) == AFTER
    loss, norm = _measured[source, target] = max(pairs[0]), max(pairs[1])
    assert loss <= BOUND
    assert norm <= BOUND
    if source != target:
        assert run.controllers == reference.controllers
        for name, weight in reference.weights.items():
            assert float((run.weights[name] - weight).norm() / weight.norm()) <= BOUND, name


@pytest.mark.parametrize("layout", [name for name in SOURCES if name in TARGETS])
def test_the_same_layout_goes_on_to_the_bit_for_twenty_steps(layout: str, lattice: Any) -> None:
    saved, _, loaded = lattice
    run, whole = loaded(layout)[layout], saved(layout)
    assert len(run.losses) == AFTER_ON_THE_SAME
    assert run.losses == whole.losses[SAVED_AT:]
    assert run.norms == whole.norms[SAVED_AT:]
    assert run.controllers == whole.controllers
    for name, weight in whole.weights.items():
        assert torch.equal(run.weights[name], weight), name


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """Writes the table when every pair was measured."""
    yield
    if ALL_PAIRS and len(_measured) == len(ZERO) ** 2:
        TABLE.write_text(_table(), encoding="utf-8")


def _table() -> str:
    names = list(ZERO)
    rows = [
        f"| {n}. {source}, ZeRO-{ZERO[source]}, {BY_NAME[source].world} | "
        + " | ".join(f"{max(_measured[source, target]):.0e}" for target in names)
        + " |"
        for n, source in enumerate(names, start=1)
    ]
    lines = [
        "# Resume lattice",
        "",
        "Generated by `make lattice-table` from `tests/distributed/test_lattice.py`; do not edit.",
        "",
        f"A tiny HyperMoE + DA-MoE decoder, fp32, saved after {SAVED_AT} steps on the layout of the row (with its ZeRO",
        f"stage and number of ranks) and loaded on the layout of the column: over the next {AFTER} steps the largest",
        "relative difference, of losses and gradient norms, from one process that was never interrupted. The bound of",
        f"the test is {BOUND:.0e}. On the diagonal {AFTER_ON_THE_SAME} steps also equal those of the same layout",
        "uninterrupted, bit for bit: losses, norms, weights and controllers.",
        "",
        "| saved on, loaded on: | " + " | ".join(str(n) for n in range(1, len(names) + 1)) + " |",
        "| --- |" + " --- |" * len(names),
        *rows,
    ]
    return "\n".join(lines) + "\n"
