"""Layout parity of bidirectional models: masked language models with unequal counts of hidden tokens, and classifiers
of padded texts."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
from encoders import assert_same, classifier_config, encoder_config, train
from parity import LAYOUTS, SINGLE, Layout

from moetrain.config.schema import RunConfig
from moetrain.testing import run_distributed

BY_NAME = {layout.name: layout for layout in [SINGLE, *LAYOUTS]}
VARIANTS: dict[str, dict[str, Any]] = {
    "masked": {},
    "masked, tied": {"tied": True},
    "masked, paper budget, recompute": {
        "model__moe__router": {"type": "da_moe", "importance": "row_max", "budget": "paper", "max_k": 3},
        "model__recompute": "full",
    },
    "masked, micro-batches of 2": {"training__micro_batch_size": 2},
    "classes": {},
    "classes of a decoder": {
        "model__type": "decoder",
        "model__moe__router": {"type": "da_moe", "importance": "row_entropy", "controller_rate": 1.0},
        "model__head": {"outputs": 3, "pooling": "last"},
    },
    "classes, micro-batches of 2": {"training__micro_batch_size": 2, "model__head": {"outputs": 3, "pooling": "first"}},
    "scores": {"training__objective": {"type": "regress"}, "model__head": {"outputs": 1}, "model__recompute": "full"},
}


def config_of(layout: Layout, zero: int, variant: str) -> RunConfig:
    make = encoder_config if variant.startswith("masked") else classifier_config
    return make(layout, zero, **VARIANTS[variant])


SOME = ("masked", "classes")
LAUNCHES = {
    ("dp2", 2): tuple(VARIANTS),
    ("tp2", 0): SOME,
    ("tp2+sp x ep2", 1): tuple(VARIANTS),
    ("pp2 x ep2", 1): ("masked, tied", "classes"),
    ("tp2+sp x pp2 x ep2", 1): SOME,
}


@lru_cache
def runs(layout: str, zero: int) -> dict[str, dict[str, Any]]:
    """The variants of a layout, in one launch."""
    at = BY_NAME[layout]
    variants = LAUNCHES.get((layout, zero), tuple(VARIANTS))
    results = run_distributed(train, at.world, [config_of(at, zero, variant) for variant in variants])[0]
    return dict(zip(variants, results, strict=True))


@pytest.mark.parametrize(
    ("layout", "zero", "variant"), [(*launch, variant) for launch, variants in LAUNCHES.items() for variant in variants]
)
def test_a_layout_gives_the_trajectory_of_one_process(layout: str, zero: int, variant: str) -> None:
    assert_same(runs(layout, zero)[variant], runs("single", 1)[variant])


def test_routing_is_variable_norms_are_clipped_and_padding_counts_nowhere() -> None:
    """What the parity runs must exercise, or they would prove less than they say."""
    for variant, run in runs("single", 1).items():
        assert min(run["norms"]) > 0.5, variant  # optimizer.clip_grad
        assert any(sum(n > 0 for n in histogram) > 1 for histogram in run["histograms"]), variant
    assert any(run["evaluation"].hits for run in runs("single", 1).values())
    classes = runs("single", 1)["classes"]
    assert classes["evaluation"].outputs.shape == (8, 3)
    # Not as a token with no expert either.
    assert all(histogram[0] == 0 and sum(histogram) < 8 * 16 for histogram in classes["histograms"])
