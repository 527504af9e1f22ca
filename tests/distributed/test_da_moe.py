"""DA-MoE on real process groups: every measure on split layouts, its budget in real trainings, and no leak."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from parity import LAYOUTS, SINGLE, Layout, batch_of, differences, layout_of, run_steps, tiny_config, train_all

from moetrain.checkpoint.comm import TorchDistributed
from moetrain.checkpoint.manager import CheckpointManager
from moetrain.config.loader import config_to_dict
from moetrain.config.schema import RunConfig
from moetrain.config.size import flops_per_token, parameter_shapes
from moetrain.model.parameters import named_parameters
from moetrain.moe.layer import MoELayer
from moetrain.runtime.groups import create_groups
from moetrain.testing import run_distributed
from moetrain.train.setup import build_step
from moetrain.train.state import collect_pieces, restore

BOUND = 1e-5
BY_NAME = {layout.name: layout for layout in [SINGLE, *LAYOUTS]}
WARM_UP, LAST = 70, 120

ROUTERS = {
    "self_weight": {"importance": "self_weight", "mean_k": 2.5},
    "row_max": {"importance": "row_max"},
    "row_entropy low": {"importance": "row_entropy", "direction": "low"},
    "row_max debiased": {"importance": "row_max", "debias": "position", "mean_k": 2.5},
    "self_weight debiased low": {"importance": "self_weight", "debias": "position", "direction": "low"},
    "predicted": {"importance": "predicted", "predictor_loss_coeff": 0.1},
    "predicted received debiased": {"importance": "predicted", "teacher": "received", "debias": "position"},
    "random": {"importance": "random"},
}
PAPER = {
    "row_max paper": {"importance": "row_max", "budget": "paper"},
    "row_entropy paper": {"importance": "row_entropy", "budget": "paper", "gates": "renormalized"},
    "predicted paper": {"importance": "predicted", "budget": "paper"},
}


def config_of(layout: Layout, router: dict, **changes: object) -> RunConfig:
    # Larger epsilon: below it Adam makes whole steps of gradients that are nothing but rounding (2e-5 of the
    # hypernetwork's smallest head at 1e-6). The gradients themselves: test_gradient_parity.py.
    changes = {"optimizer__eps": 1e-5, **changes}
    return tiny_config(layout, 1, model__moe__router={"type": "da_moe", "mean_k": 2.0, **router}, **changes)


# --- parity ------------------------------------------------------------------------------------------------------


def all_configs(layout: Layout) -> list[RunConfig]:
    configs = [config_of(layout, router) for router in {**ROUTERS, **PAPER}.values()]
    # A recomputed forward pass must neither count twice nor learn twice.
    recomputed = [ROUTERS["row_max debiased"], ROUTERS["predicted"]]
    return configs + [config_of(layout, router, model__recompute="full") for router in recomputed]


@pytest.fixture(scope="module")
def single() -> list:
    return run_distributed(train_all, 1, all_configs(SINGLE))[0]


@pytest.mark.parametrize("name", ["dp2", "tp2+sp x pp2 x ep2"])
def test_every_measure_gives_the_trajectory_of_one_process(name: str, single: list) -> None:
    layout = BY_NAME[name]
    runs = run_distributed(train_all, layout.world, all_configs(layout))[0]
    labels = [*ROUTERS, *PAPER, "row_max debiased, recomputed", "predicted, recomputed"]
    for label, run, reference in zip(labels, runs, single, strict=True):
        assert run.controllers == reference.controllers, label
        assert max(differences(run, reference)) <= BOUND, label


def test_recomputation_changes_nothing_and_controllers_move(single: list) -> None:
    by_name = dict(zip([*ROUTERS, *PAPER], single, strict=False))
    for name, recomputed in zip(("row_max debiased", "predicted"), single[-2:], strict=True):
        assert recomputed.controllers == by_name[name].controllers
        assert max(differences(recomputed, by_name[name])) <= BOUND
    for name in ROUTERS:
        states = by_name[name].controllers
        assert len({str(state) for key, state in states.items() if key.endswith("thresholds")}) == 3  # layers
    assert not by_name["row_max paper"].controllers


# --- the budget --------------------------------------------------------------------------------------------------


def mean_k_of(configs: list[RunConfig], folder: Path, first: int, last: int) -> list[list[list[float]]]:
    """Mean K of every step and MoE layer, [config][step][layer], from `folder`'s checkpoints if first > 0; leaves
    checkpoints there."""
    groups = create_groups(layout_of(configs[0]), seed=1)
    everything = []
    for number, config in enumerate(configs):
        step = build_step(config, groups, torch.device("cpu"))
        manager = CheckpointManager(folder / str(number), keep_last=1, comm=TorchDistributed())
        record = {"config": number, "ranks": groups.layout.world_size}
        if first > 0:
            reader = manager.open()
            assert reader is not None and reader.step == first
            restore(step, reader, record, logging.getLogger("test"))
        size, rank, means = groups.layout.data, groups.coordinates.data, []
        for at in range(first, last):
            outcome = step.run(batch_of(at, config, rank, size), config.optimizer.lr)
            means.append([outcome.router[layer].mean_k for layer in sorted(outcome.router)])
        pieces = collect_pieces(step)
        manager.save(last, last * 8, pieces, config_to_dict(config), record, {"optimizer_steps": last})
        everything.append(means)
    return everything


def test_mean_k_is_within_one_percent_of_the_budget_in_training_and_after_resuming_elsewhere(tmp_path: Path) -> None:
    names = ("row_max debiased", "predicted")
    routers = [ROUTERS[name] for name in names]
    first, second = SINGLE, BY_NAME["tp2+sp x ep2"]
    whole = {"training__micro_batch_size": 8}  # the same mean in an eighth of the time
    before = run_distributed(mean_k_of, 1, [config_of(first, r, **whole) for r in routers], tmp_path, 0, LAST)[0]
    after = run_distributed(
        mean_k_of, second.world, [config_of(second, r, **whole) for r in routers], tmp_path, LAST, LAST + 50
    )[0]
    for label, router, steps, resumed in zip(names, routers, before, after, strict=True):
        for layer in range(3):
            for part in (steps[WARM_UP:], resumed):
                mean = sum(means[layer] for means in part) / len(part)
                assert abs(mean / router.get("mean_k", 2.0) - 1) < 0.01, (label, layer, mean)
        # The first step after the resume is already at the budget: the controllers were restored.
        assert abs(resumed[0][0] / router.get("mean_k", 2.0) - 1) < 0.25, label


# --- the future --------------------------------------------------------------------------------------------------

LENGTH, CHANGED = 48, 29


def observe(configs: list[RunConfig], training: bool) -> list[list[tuple[torch.Tensor, torch.Tensor, list]]]:
    """For each config and each of two sequences that differ from CHANGED on: logits, and of every MoE layer the expert
    ids, the weights and the router's own loss; after three steps of training."""
    groups, results = create_groups(layout_of(configs[0]), seed=1), []
    for config in configs:
        step = build_step(config, groups, torch.device("cpu"))
        run_steps(step, range(3))
        (decoder,) = step.chunks
        decoder.train(training)
        seen: list = []
        for module in decoder.modules():
            if isinstance(module, MoELayer):
                module.router.register_forward_hook(
                    lambda _, __, d, seen=seen: seen.append((d.expert_ids_TK, d.weights_TK, d.loss))
                )
        generator = torch.Generator().manual_seed(3)
        tokens = torch.randint(0, config.model.vocab_size, (1, LENGTH), generator=generator)
        other = tokens.clone()
        other[:, CHANGED:] = torch.randint(0, config.model.vocab_size, (1, LENGTH - CHANGED), generator=generator)
        pair = []
        for sequence in (tokens, other):
            seen.clear()
            with torch.no_grad():
                logits = decoder(sequence, torch.arange(LENGTH)[None], None)[0]
            pair.append((logits, list(seen)))
        results.append(pair)
    return results


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_the_future_changes_no_bit_of_the_past(training: bool) -> None:
    routers = {**ROUTERS, **PAPER}
    configs = [config_of(SINGLE, router, model__seq_length=LENGTH) for router in routers.values()]
    for label, pair in zip(routers, run_distributed(observe, 1, configs, training)[0], strict=True):
        (logits, seen), (other_logits, other_seen) = pair
        assert torch.equal(logits[:CHANGED], other_logits[:CHANGED]), label
        assert len(seen) == 3
        changed = False
        for (ids, weights, loss), (other_ids, other_weights, other_loss) in zip(seen, other_seen, strict=True):
            assert torch.equal(ids[:CHANGED], other_ids[:CHANGED]), label
            assert torch.equal(weights[:CHANGED], other_weights[:CHANGED]), label
            changed |= not torch.equal(ids[CHANGED:], other_ids[CHANGED:])
            # The teacher knows the future, and is there in training only: the experiment must be able to fail.
            assert (loss is not None) == (training and label.startswith("predicted"))
            if loss is not None:
                assert loss != other_loss
        assert changed, label


# --- size --------------------------------------------------------------------------------------------------------


def test_a_predictor_is_one_vector_per_layer_in_the_count_and_in_the_operations() -> None:
    plain, predicted = (config_of(SINGLE, ROUTERS[name]).model for name in ("row_max", "predicted"))
    extra = set(parameter_shapes(predicted)) - set(parameter_shapes(plain))
    assert extra == {(f"decoder.layers.{i}.mlp.router.predictor", (32,)) for i in (0, 2, 3)}
    assert flops_per_token(predicted) - flops_per_token(plain) == 3 * 3 * 2 * 32


def shapes(config: RunConfig) -> dict[str, tuple[int, ...]]:
    step = build_step(config, create_groups(layout_of(config), seed=1), torch.device("cpu"))
    return {name: tuple(p.shape) for name, p in named_parameters(step.chunks)}


def test_the_built_model_has_the_predictor_that_is_counted() -> None:
    config = config_of(SINGLE, ROUTERS["predicted"])
    assert run_distributed(shapes, 1, config)[0] == dict(parameter_shapes(config.model))
