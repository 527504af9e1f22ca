"""Layout parity is the law: every layout and ZeRO stage gives the losses, gradient norms and updated weights of one
process. `make parity-table` writes what this test measured into docs/reference/layout-parity.md."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest
from parity import (
    LAYOUTS,
    SINGLE,
    STEPS,
    Layout,
    Trajectory,
    differences,
    tiny_config,
    train_all,
    train_with_broken_tie,
)

from moetrain.testing import run_distributed

BOUND = 1e-5
ZERO_STAGES = (0, 1, 2)
VARIANTS = [(zero, tied) for zero in ZERO_STAGES for tied in (False, True)]
TABLE = Path(__file__).parents[2] / "docs" / "reference" / "layout-parity.md"
_measured: dict[tuple[str, int, bool], tuple[float, float, float]] = {}


@lru_cache
def trajectories(layout: Layout) -> dict[tuple[int, bool], Trajectory]:
    """All ZeRO stages, tied and untied, in one launch of the layout."""
    runs = run_distributed(train_all, layout.world, [tiny_config(layout, zero, tied) for zero, tied in VARIANTS])[0]
    return dict(zip(VARIANTS, runs, strict=True))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("zero", ZERO_STAGES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_layout_gives_the_trajectory_of_one_process(layout: Layout, zero: int, tied: bool) -> None:
    reference = trajectories(SINGLE)[1, tied]
    run = trajectories(layout)[zero, tied]
    loss, norm, weights = _measured[layout.name, zero, tied] = differences(run, reference)
    assert run.controllers == reference.controllers
    assert loss <= BOUND
    assert norm <= BOUND
    assert weights <= BOUND


def test_zero_stages_of_one_process_agree() -> None:
    reference = trajectories(SINGLE)[1, False]
    for zero in ZERO_STAGES:
        assert max(differences(trajectories(SINGLE)[zero, False], reference)) <= BOUND


def test_routing_is_variable_and_the_norm_is_clipped() -> None:
    """What the parity runs must exercise, or they would prove less than they say."""
    reference = trajectories(SINGLE)[1, False]
    assert min(reference.norms) > 0.5  # optimizer.clip_grad
    assert len({str(value) for value in reference.controllers.values()}) > 1
    assert reference.losses[-1] < reference.losses[0]


@pytest.mark.parametrize("tied", [False, True], ids=["hypernetwork", "embedding"])
def test_parity_fails_when_the_gradients_of_a_tied_parameter_are_not_summed(tied: bool) -> None:
    layout = next(layout for layout in LAYOUTS if layout.name == "pp2")
    run = run_distributed(train_with_broken_tie, layout.world, tiny_config(layout, 1, tied))[0]
    loss, norm, weights = differences(run, trajectories(SINGLE)[1, tied])
    print(f"broken tie: loss {loss:.1e}, norm {norm:.1e}, weights {weights:.1e}")
    assert norm > BOUND
    assert weights > BOUND


@pytest.mark.parametrize("zero", ZERO_STAGES)
@pytest.mark.parametrize("name", ["tp2+sp", "pp2 x ep2"])
def test_full_recompute_changes_nothing(name: str, zero: int) -> None:
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    run = run_distributed(train_all, layout.world, [tiny_config(layout, zero, model__recompute="full")])[0][0]
    reference = trajectories(SINGLE)[1, False]
    assert run.controllers == reference.controllers
    assert max(differences(run, reference)) <= BOUND


@pytest.mark.parametrize("importance", ["row_max", "row_entropy"])
def test_every_importance_is_right_when_heads_and_tokens_are_split(importance: str) -> None:
    layout = next(layout for layout in LAYOUTS if layout.name == "tp2+sp x ep2")
    # At the default of 1e-8 Adam makes a whole step of a gradient that is nothing but rounding. With row_max one
    # element of an attention projection gets such a gradient, and its tensor then differs by 2.6e-5.
    changes = {"model__moe__router__importance": importance, "optimizer__eps": 1e-6}
    single, split = (
        run_distributed(train_all, at.world, [tiny_config(at, 1, **changes)])[0][0] for at in (SINGLE, layout)
    )
    assert split.controllers == single.controllers
    assert max(differences(split, single)) <= BOUND


def test_the_papers_budget_and_plain_top_k_keep_parity() -> None:
    layout = next(layout for layout in LAYOUTS if layout.name == "tp2+sp x ep2")
    routers = [
        {"type": "da_moe", "importance": "row_max", "budget": "paper", "gates": "renormalized"},
        {"type": "top_k", "top_k": 2},
    ]
    changes = [{"model__moe__router": router} for router in routers]
    single, split = (
        run_distributed(train_all, at.world, [tiny_config(at, 1, **c) for c in changes])[0] for at in (SINGLE, layout)
    )
    for run, reference in zip(split, single, strict=True):
        assert max(differences(run, reference)) <= BOUND


@pytest.fixture(scope="module", autouse=True)
def parity_table() -> Iterator[None]:
    """Writes the table when MOETRAIN_WRITE_TABLES=1 and every cell was measured."""
    yield
    if os.environ.get("MOETRAIN_WRITE_TABLES") == "1" and len(_measured) == len(LAYOUTS) * len(VARIANTS):
        TABLE.parent.mkdir(parents=True, exist_ok=True)
        TABLE.write_text(table(), encoding="utf-8")


def table() -> str:
    """Markdown: one row per layout, one column per ZeRO stage; each cell the largest relative differences of loss,
    gradient norm and weights over untied and tied embeddings."""
    lines = [
        "# Layout parity",
        "",
        "Generated by `make parity-table` from `tests/distributed/test_layout_parity.py`; do not edit.",
        "",
        f"A tiny HyperMoE + DA-MoE decoder, fp32, {STEPS} steps with gradient clipping active, against one process:",
        "the largest relative difference of the loss of any step, of the gradient norm of any step, and of any updated",
        "weight tensor, each over untied and tied embeddings. The bound of the test is 1e-5.",
        "",
        "| layout | ranks | " + " | ".join(f"ZeRO-{zero}: loss / norm / weights" for zero in ZERO_STAGES) + " |",
        "| --- | --- | " + " | ".join("---" for _ in ZERO_STAGES) + " |",
    ]
    for layout in LAYOUTS:
        cells = []
        for zero in ZERO_STAGES:
            worst = [max(pair) for pair in zip(*(_measured[layout.name, zero, t] for t in (False, True)), strict=True)]
            cells.append(" / ".join(f"{value:.1e}" for value in worst))
        lines.append(f"| {layout.name} | {layout.world} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
