"""Every arm of both studies is a legal run at every preset, and the controls are as equal as they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from moetrain.claims.damoe import damoe_study
from moetrain.claims.hypermoe import hypermoe_study
from moetrain.claims.lab import Lab
from moetrain.claims.study import Outcome
from moetrain.config.loader import load_config
from moetrain.config.schema import RunConfig
from moetrain.config.size import flops_per_token, parameter_count

CONFIGS = Path(__file__).parents[3] / "configs" / "claims"
STUDIES = {"hypermoe": hypermoe_study, "damoe": damoe_study}
OUTCOME = Outcome(loss=3.0, mean_k=2.6)


def configs(study: str, preset: str) -> dict[str, RunConfig]:
    file = CONFIGS / f"{preset}.yaml"
    made = STUDIES[study](load_config([file]))
    lab = Lab(made, [1], [file], [], Path("unused"))
    return {arm.name: lab.config(arm.name, 1, {"paper": OUTCOME}) for arm in made.arms}


@pytest.mark.parametrize("preset", ["quick", "full"])
@pytest.mark.parametrize("study", STUDIES)
def test_every_arm_is_a_legal_run_of_its_own(study: str, preset: str) -> None:
    runs = configs(study, preset)
    models = [(run.model, run.training.objective) for run in runs.values()]
    below = [pair for pair in models if models.count(pair) > 1]
    # Where the paper's mean K happens to be the budget, a fixed K beside it repeats another arm.
    assert all(run.training.seed == 1 for run in runs.values())
    assert len(below) <= 2


@pytest.mark.parametrize("preset", ["quick", "full"])
def test_the_controls_of_capacity_are_equal_to_hypermoe_in_what_they_name(preset: str) -> None:
    models = {name: run.model for name, run in configs("hypermoe", preset).items()}
    for k in (1, 2):
        wide, hyper = flops_per_token(models[f"wide-k{k}"]), flops_per_token(models[f"hyper-k{k}"])
        assert wide == pytest.approx(hyper, rel=1e-9)
    heavy, hyper = parameter_count(models["heavy-k1"]).total, parameter_count(models["hyper-k1"]).total
    unit = parameter_count(models["moe-k1"]).expert / models["moe-k1"].moe.ffn_hidden_size  # type: ignore[union-attr]
    assert abs(heavy - hyper) <= unit / 2


def test_the_arms_of_d1_have_one_budget_and_the_papers_neighbors_straddle_its_mean() -> None:
    runs = configs("damoe", "full")
    budgets = {name: run.model.moe.expected_mean_k for name, run in runs.items() if run.model.moe is not None}
    assert {budget for name, budget in budgets.items() if name.endswith(("-high", "-low")) or name == "random"} == {2.0}
    assert (budgets["paper-below"], budgets["paper-above"]) == (2.0, 3.0)
