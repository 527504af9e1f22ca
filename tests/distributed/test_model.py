"""The model as built, against what the config and the checkpoint format say of it."""

from __future__ import annotations

import math

import torch
from parity import LAYOUTS, SINGLE, Layout, layout_of, run_steps, tiny_config, whole_weights

from moetrain.config.size import parameter_shapes
from moetrain.model.build import transformer_config
from moetrain.moe.layer import MoELayer
from moetrain.moe.routing import RoutingContext
from moetrain.runtime.groups import create_groups
from moetrain.testing import run_distributed
from moetrain.train.setup import build_step
from moetrain.train.step import TrainStep

BY_NAME = {layout.name: layout for layout in [SINGLE, *LAYOUTS]}


def build(layout: Layout, changes: dict) -> TrainStep:
    config = tiny_config(layout, **changes)
    return build_step(config, create_groups(layout_of(config), seed=1), torch.device("cpu"))


def shapes_on(layout: Layout, changes: dict) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in whole_weights(build(layout, changes)).items()}


def test_the_checkpoint_holds_exactly_the_parameters_that_the_config_counts() -> None:
    for changes in ({}, {"model__share_embeddings_and_output_weights": True}, {"model__moe": None}):
        expected = dict(parameter_shapes(tiny_config(SINGLE, **changes).model))
        assert run_distributed(shapes_on, 1, SINGLE, changes)[0] == expected


def test_a_split_model_holds_the_same_parameters() -> None:
    layout = BY_NAME["tp2+sp x pp2 interleaved x ep2"]
    assert run_distributed(shapes_on, layout.world, layout, {})[0] == dict(parameter_shapes(tiny_config(SINGLE).model))


def initial_weights(layout: Layout) -> dict[str, torch.Tensor]:
    return whole_weights(build(layout, {"model__share_embeddings_and_output_weights": True}))


def test_every_layout_starts_from_the_same_bits() -> None:
    reference = run_distributed(initial_weights, 1, SINGLE)[0]
    for name in ("tp2", "pp2 interleaved", "ep4", "tp2+sp x pp2 x ep2"):
        mine = run_distributed(initial_weights, BY_NAME[name].world, BY_NAME[name])[0]
        assert all(torch.equal(mine[key], weight) for key, weight in reference.items()), name


def initial_hyper_output(changes: dict) -> tuple[float, float, bool]:
    """rms of the hyper-expert's output on unit-variance input, rms of the input, and whether Ê reaches the router."""
    step = build(SINGLE, changes)
    layer = next(m for m in step.chunks[0].modules() if isinstance(m, MoELayer))
    assert layer.hyper is not None
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    decision = layer.router(x, RoutingContext(64, 1, 64, 0, torch.rand(64)))
    output = layer.hyper(x, decision.expert_ids_TK, decision.probs_TE)
    output.sum().backward()
    return float(output.square().mean().sqrt()), float(x.square().mean().sqrt()), layer.router.weight.grad is not None


def test_the_generated_expert_starts_near_zero_and_sends_no_gradient_to_the_router() -> None:
    hyper_rms, input_rms, reaches_router = run_distributed(initial_hyper_output, 1, {})[0]
    assert 0 < hyper_rms < 1e-2 * input_rms
    assert not reaches_router


def four_steps(layout: Layout, zero: int, precision: str) -> tuple[list[float], list[float], set[torch.dtype]]:
    config = tiny_config(layout, zero, training__precision=precision)
    step = build_step(config, create_groups(layout_of(config), seed=1), torch.device("cpu"))
    losses, norms = run_steps(step, range(4))
    assert step.optimizer is not None
    masters = {t.dtype for f in step.optimizer.fragments() for t in (f.master, f.exp_avg, f.exp_avg_sq)}
    return losses, norms, masters


def test_bf16_layouts_and_zero_stages_agree_with_fp32_within_its_precision() -> None:
    """The norm is what tells: a gradient that got lost or was counted twice changes it, and hardly the loss."""
    exact, exact_norms, _ = run_distributed(four_steps, 1, SINGLE, 1, "fp32")[0]
    runs = [("single", 1), ("dp2", 0), ("dp2", 2), ("tp2+sp x ep2", 1), ("pp2 x ep2", 1), ("pp2 x ep2", 2)]
    for name, zero in runs:
        layout = BY_NAME[name]
        losses, norms, masters = run_distributed(four_steps, layout.world, layout, zero, "bf16")[0]
        assert masters == {torch.float32}
        for mine, reference in zip([*losses, *norms], [*exact, *exact_norms], strict=True):
            assert abs(mine - reference) / reference < 0.03, (name, zero)


def poisoned_run(layout: Layout, zero: int) -> tuple[list[bool], list[float], bool]:
    """Step 1 of 3 meets an infinite gradient on one rank only; are the weights then as they were?"""
    config = tiny_config(layout, zero)
    step = build_step(config, create_groups(layout_of(config), seed=1), torch.device("cpu"))
    assert step.optimizer is not None
    skipped, norms, unchanged = [], [], False
    from parity import batch_of

    at = step.groups.coordinates
    for i in range(3):
        before = whole_weights(step)
        handle = None
        if i == 1 and at.data == 0 and at.tensor == 0 and at.pipeline == 0:
            victim = next(p for p in step.chunks[0].parameters() if p.ndim == 2)
            handle = victim.register_hook(lambda g: g * math.inf)
        outcome = step.run(batch_of(i, config, at.data, step.groups.layout.data), 1e-3)
        if handle is not None:
            handle.remove()
        skipped.append(outcome.skipped)
        norms.append(outcome.grad_norm)
        if i == 1:
            after = whole_weights(step)
            unchanged = all(torch.equal(after[k], before[k]) for k in before)
    return skipped, norms, unchanged


def test_a_step_with_a_nonfinite_gradient_is_skipped_by_all_ranks_and_changes_nothing() -> None:
    for name, zero in (("pp2 x ep2", 1), ("tp2+sp x ep2", 2), ("dp2", 0)):
        layout = BY_NAME[name]
        for skipped, norms, unchanged in run_distributed(poisoned_run, layout.world, layout, zero):
            assert skipped == [False, True, False]
            assert not math.isfinite(norms[1])
            assert math.isfinite(norms[2])
            assert unchanged


def test_both_silent_corruption_traps_stay_closed() -> None:
    """Interleaving needs single messages, or two stages swap activations; on gloo it must not free what isend reads."""
    plain = tiny_config(BY_NAME["pp2"])
    interleaved = tiny_config(BY_NAME["pp2 interleaved"])
    config = transformer_config(interleaved.model, interleaved.parallel, torch.float32)
    assert (config.batch_p2p_comm, config.overlap_p2p_comm) == (False, True)
    assert config.deallocate_pipeline_outputs == torch.cuda.is_available()
    config = transformer_config(plain.model, plain.parallel, torch.float32)
    assert (config.batch_p2p_comm, config.overlap_p2p_comm) == (True, False)
