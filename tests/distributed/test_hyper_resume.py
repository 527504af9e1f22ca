"""A model whose hypernetworks belong to groups of layers resumes on another number of pipeline stages: each of them is
stored once, whoever held it."""

from __future__ import annotations

from pathlib import Path

import pytest
from parity import LAYOUTS, SINGLE, Layout
from test_resume import HALF, STEPS, run_part

from moetrain.testing import run_distributed

BY_NAME = {layout.name: layout for layout in [SINGLE, *LAYOUTS, Layout("pp4", 4, pipeline=4)]}


def part(layout: Layout, zero: int, folder: Path, first: int, last: int) -> dict:
    hyper = {"bottleneck": 4, "hidden": 8, "expert_embedding": 6, "process": 10, "condition": 8, "layer_embedding": 4}
    hyper |= {"sharing": "stage", "stages": 2, "embeddings": "model"}
    changes = {"model__moe__layer_freq": 1, "model__moe__hyper": hyper}
    return run_part(layout, zero, False, folder, first, last, **changes)


@pytest.mark.parametrize(
    ("before", "after"), [("pp4", "single"), ("pp4", "pp2 x ep2"), ("pp2", "pp4"), ("single", "pp2 interleaved")]
)
def test_hypernetworks_of_groups_resume_on_another_pipeline(before: str, after: str, tmp_path: Path) -> None:
    first, then = BY_NAME[before], BY_NAME[after]
    whole = run_distributed(part, 1, SINGLE, 1, tmp_path / "whole", 0, STEPS)[0]
    run_distributed(part, first.world, first, 1, tmp_path / "parts", 0, HALF)
    resumed = run_distributed(part, then.world, then, 2, tmp_path / "parts", HALF, STEPS)[0]
    assert {name.split(".input")[0] for name in resumed["weights"] if name.endswith(".input.weight")} == {
        "hypernetworks.0",
        "hypernetworks.1",
    }
    for kind in ("losses", "norms"):
        for mine, reference in zip(resumed[kind], whole[kind][HALF:], strict=True):
            assert abs(mine - reference) / abs(reference) <= 1e-5
    for name, weight in whole["weights"].items():
        assert float((resumed["weights"][name] - weight).norm() / weight.norm()) <= 1e-5, name
