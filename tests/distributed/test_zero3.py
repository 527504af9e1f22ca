"""ZeRO-3 trains as one process with ZeRO-1 does, holds only its part between uses, and shares checkpoints with every
other stage."""

from __future__ import annotations

import gc
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity import SINGLE, STEPS, Layout, batch_of, layout_of, run_steps, tiny_config

from moetrain.checkpoint.comm import TorchDistributed
from moetrain.checkpoint.manager import CheckpointManager
from moetrain.config.deepspeed import zero_settings
from moetrain.config.loader import config_to_dict
from moetrain.config.schema import RunConfig
from moetrain.runtime.groups import create_groups
from moetrain.testing import run_distributed
from moetrain.train.setup import build_step
from moetrain.train.state import collect_pieces, restore
from moetrain.train.step import TrainStep

BOUND = 1e-5  # relative
HALF = 3

DP2 = Layout("dp2", 2)
TP2 = Layout("tp2", 2, tensor=2)
TP2_SP_DP2 = Layout("tp2+sp x dp2", 4, tensor=2, sequence=True)
LAYOUTS = [SINGLE, DP2, Layout("dp4", 4), TP2, Layout("tp2 x dp2", 4, tensor=2), TP2_SP_DP2]

# Nothing stays gathered longer than it is used, and little is gathered ahead: a fraction of the model's 19 k elements.
STRICT = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 2000,
    "stage3_max_live_parameters": 5000,
}
# Each changes how the work is cut, buffered or ordered, so none may change the result.
SETTINGS: dict[str, dict[str, Any]] = {
    "DeepSpeed's own choices": {},
    "nothing gathered ahead": {**STRICT, "stage3_prefetch_bucket_size": 0},
    "norms stay gathered": {**STRICT, "stage3_param_persistence_threshold": 32},
    "two of the norms stay gathered": {
        **STRICT,
        "stage3_param_persistence_threshold": 32,
        "stage3_model_persistence_threshold": 64,
    },
    "several sub-groups": {**STRICT, "sub_group_size": 2000},
    "all-reduce for reduce-scatter": {**STRICT, "reduce_scatter": False},
    "no gradient buffer": {**STRICT, "contiguous_gradients": False},
    "overlapping communication": {**STRICT, "overlap_comm": True},
}


def dense(
    layout: Layout, zero: int, tied: bool = False, settings: dict[str, Any] | None = None, **changes: object
) -> RunConfig:
    """Two layers of the parity table's model without experts, a step of two to four micro-batches per rank; ZeRO-3
    with `settings`."""
    fixed = {
        "model__moe": None,
        "model__num_layers": 2,
        "optimizer__type": "adamw",
        "training__micro_batch_size": 2 if layout.world // layout.tensor <= 2 else 1,
        "deepspeed": {"zero_optimization": STRICT if settings is None else settings} if zero == 3 else {},
    }
    return tiny_config(layout, zero, tied, **{**fixed, **changes})


def build(config: RunConfig) -> TrainStep:
    return build_step(config, create_groups(layout_of(config), seed=1), torch.device("cpu"))


def state_of(step: TrainStep) -> dict[str, torch.Tensor]:
    """Masters and moments of the whole model, put together from all ranks by their names in checkpoints."""
    mine = [
        (p.name, p.global_shape, p.rect.slices_from((0,) * p.tensor.dim()), p.tensor.clone())
        for p in collect_pieces(step)
    ]
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [entry for entry in mine if not entry[0].startswith("rng.")])
    whole: dict[str, torch.Tensor] = {}
    for name, shape, at, tensor in (entry for entries in everyone for entry in entries):
        target = whole.setdefault(name, torch.full(shape, float("nan")))
        assert target[at].isnan().all(), f"two ranks store the same elements of {name}"
        target[at] = tensor
    for name, tensor in whole.items():
        assert not tensor.isnan().any(), f"no rank stores all of {name}"
    return whole


def train(configs: list[RunConfig]) -> list[dict[str, Any]]:
    """In every rank: five steps of each config, with passes for evaluation before, between and after them."""
    groups = create_groups(layout_of(configs[0]), seed=1)
    records = []
    for config in configs:
        step = build_step(config, groups, torch.device("cpu"))
        held_out = batch_of(100, config, groups.coordinates.data, groups.layout.data)
        evaluated = [step.evaluate(held_out).loss]
        losses, norms = run_steps(step, range(HALF))
        evaluated.append(step.evaluate(held_out).loss)
        more_losses, more_norms = run_steps(step, range(HALF, STEPS))
        evaluated.append(step.evaluate(held_out).loss)
        numbers = {"loss": losses + more_losses, "norm": norms + more_norms, "evaluation": evaluated}
        records.append({**numbers, "state": state_of(step)})
    return records


def assert_close(record: dict[str, Any], reference: dict[str, Any]) -> None:
    """Losses, norms and evaluations relatively; every weight relatively, as a whole tensor."""
    for kind in ("loss", "norm", "evaluation"):
        assert record[kind] == pytest.approx(reference[kind], rel=BOUND, abs=0), kind
    assert record["state"].keys() == reference["state"].keys()
    for name, tensor in reference["state"].items():
        if name.startswith("weight."):
            assert float((record["state"][name] - tensor).norm() / tensor.norm()) <= BOUND, name


@pytest.fixture(scope="module")
def references() -> dict[bool, dict[str, Any]]:
    """One process with ZeRO-1, with untied and with tied embeddings."""
    untied, tied = run_distributed(train, 1, [dense(SINGLE, 1), dense(SINGLE, 1, tied=True)])[0]
    return {False: untied, True: tied}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_layout_trains_as_one_process_with_zero_1(layout: Layout, references: dict[bool, dict[str, Any]]) -> None:
    configs = [dense(layout, 3), dense(layout, 3, tied=True), dense(layout, 3, tied=True, model__recompute="full")]
    untied, tied, recomputed = run_distributed(train, layout.world, configs)[0]
    assert_close(untied, references[False])
    assert_close(tied, references[True])
    assert_close(recomputed, references[True])


def test_no_setting_that_is_left_to_the_user_changes_the_result(references: dict[bool, dict[str, Any]]) -> None:
    assert {key for settings in SETTINGS.values() for key in settings} == set(zero_settings(3))
    configs = [dense(DP2, 3, tied=True, settings=settings) for settings in SETTINGS.values()]
    configs.append(dense(DP2, 3, tied=True, zero__reduce_bucket_size=1000))
    for record in run_distributed(train, DP2.world, configs)[0]:
        assert_close(record, references[True])


def test_bf16_trains_as_zero_1_does() -> None:
    bf16 = {"training__precision": "bf16"}
    one, three = run_distributed(train, 2, [dense(DP2, 1, **bf16), dense(DP2, 3, **bf16)])[0]
    assert_close(three, one)


# --- memory -----------------------------------------------------------------------------------------------------------


def tensor_bytes() -> int:
    """Memory of all tensors that are alive in this process, each storage once."""
    gc.collect()
    storages = (o.untyped_storage() for o in gc.get_objects() if isinstance(o, torch.Tensor))
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def measure(config: RunConfig) -> dict[str, int]:
    """Bytes held after construction and after training; how many parameter elements are gathered after it, and at most
    while a forward pass runs."""
    groups = create_groups(layout_of(config), seed=1)
    before = tensor_bytes()
    step = build_step(config, groups, torch.device("cpu"))
    built = tensor_bytes() - before
    model, most = step.chunks[0], 0

    def gathered() -> int:
        return sum(p.numel() for p in model.parameters())

    def look(*_: object) -> None:
        nonlocal most
        most = max(most, gathered())

    batch = batch_of(0, config, groups.coordinates.data, groups.layout.data)
    for _ in range(2):  # until DeepSpeed has recorded the order of the modules, by which it gathers ahead
        step.run(batch, 1e-3)
    hooks = [layer.mlp.linear_fc1.register_forward_pre_hook(look) for layer in model.decoder.layers]
    step.evaluate(batch)
    step.run(batch, 1e-3)
    for hook in hooks:
        hook.remove()
    return {"built": built, "trained": tensor_bytes() - before, "most": most, "left": gathered()}


def test_a_rank_holds_its_part_and_gathers_a_few_weights_at_a_time() -> None:
    layout, bucket, live = Layout("dp4", 4), 4000, 30_000
    settings = {**STRICT, "stage3_max_live_parameters": live}
    larger = {"model__num_layers": 4, "model__hidden_size": 64, "model__ffn_hidden_size": 192}
    config = dense(layout, 3, settings=settings, zero__reduce_bucket_size=bucket, **larger)
    qkv, proj, fc1, fc2, norms = 64 * 128, 64 * 64, 64 * 384, 192 * 64, 2 * 64
    total = 2 * 64 * 64 + 4 * (qkv + proj + fc1 + fc2 + norms) + 64
    # fp32: weights, masters, two moments, gradients.
    part = total // layout.world * 4 * (1 + 1 + 2 + 1) + bucket * 4
    for rank in run_distributed(measure, layout.world, config):
        assert part <= rank["built"] <= 1.02 * part
        assert part <= rank["trained"] <= 1.02 * part
        assert rank["left"] == 0
        assert fc1 <= rank["most"] <= live + fc1 < total / 3  # a weight in use is not held up by the limit


# --- a gradient that is not finite ------------------------------------------------------------------------------------


def stumble(config: RunConfig) -> dict[str, Any]:
    """A step whose first micro-batch has a gradient that is not a number, between sound steps."""
    step = build(config)
    run_steps(step, range(1))
    before = state_of(step)
    poisoned = step.chunks[0].decoder.final_layernorm.weight
    hook = poisoned.register_hook(lambda gradient: gradient * float("nan"))
    at = step.groups.coordinates.data, step.groups.layout.data
    outcome = step.run(batch_of(1, config, *at), 1e-3)
    hook.remove()
    after = state_of(step)
    losses, norms = run_steps(step, range(1, 3))
    return {"skipped": outcome.skipped, "before": before, "after": after, "losses": losses, "norms": norms}


def straight(config: RunConfig) -> tuple[list[float], list[float]]:
    return run_steps(build(config), range(3))


def test_a_step_with_a_non_finite_gradient_leaves_no_trace() -> None:
    config = dense(DP2, 3, tied=True)
    stumbled = run_distributed(stumble, 2, config)[0]
    losses, norms = run_distributed(straight, 2, config)[0]
    assert stumbled["skipped"]
    assert all(torch.equal(stumbled["after"][name], tensor) for name, tensor in stumbled["before"].items())
    assert stumbled["losses"] == losses[1:] and stumbled["norms"] == norms[1:]


# --- checkpoints ------------------------------------------------------------------------------------------------------


def run_part(config: RunConfig, record: dict[str, Any], folder: Path, first: int, last: int) -> dict[str, Any]:
    """Steps [first, last): from `folder`'s checkpoint if first > 0; a checkpoint is left there."""
    step = build(config)
    manager = CheckpointManager(folder, keep_last=2, comm=TorchDistributed())
    if first > 0:
        reader = manager.open()
        assert reader is not None and reader.step == first
        restore(step, reader, record, logging.getLogger("test"))
    losses, norms = run_steps(step, range(first, last))
    manager.save(last, last * 8, collect_pieces(step), config_to_dict(config), record, {"optimizer_steps": last})
    return {"loss": losses, "norm": norms, "evaluation": [], "state": state_of(step)}


def run(layout: Layout, zero: int, folder: Path, first: int, last: int) -> dict[str, Any]:
    record = {"name": layout.name, "zero": zero}
    return run_distributed(run_part, layout.world, dense(layout, zero, tied=True), record, folder, first, last)[0]


@pytest.mark.parametrize("layout", [DP2, TP2_SP_DP2], ids=lambda layout: layout.name)
def test_resume_on_the_same_layout_is_exact_to_the_bit(layout: Layout, tmp_path: Path) -> None:
    whole = run(layout, 3, tmp_path / "whole", 0, STEPS)
    before = run(layout, 3, tmp_path / "parts", 0, HALF)
    after = run(layout, 3, tmp_path / "parts", HALF, STEPS)
    assert before["loss"] + after["loss"] == whole["loss"]
    assert before["norm"] + after["norm"] == whole["norm"]
    for name, tensor in whole["state"].items():
        assert torch.equal(after["state"][name], tensor), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Checkpoints of step 3: of ZeRO-1 on tp2 and of ZeRO-3 on dp2."""
    folders = {zero: tmp_path_factory.mktemp(f"zero-{zero}") for zero in (1, 3)}
    run(TP2, 1, folders[1], 0, HALF)
    run(DP2, 3, folders[3], 0, HALF)
    return folders


@pytest.mark.parametrize(
    ("made_by", "layout", "zero"),
    [(3, TP2, 1), (3, SINGLE, 0), (3, DP2, 2), (3, TP2_SP_DP2, 3), (1, DP2, 3), (1, TP2_SP_DP2, 3)],
    ids=lambda value: value.name if isinstance(value, Layout) else f"zero-{value}",
)
def test_a_checkpoint_continues_on_another_stage_and_layout(
    made_by: int, layout: Layout, zero: int, saved: dict[int, Path], references: dict[bool, dict], tmp_path: Path
) -> None:
    shutil.copytree(saved[made_by], tmp_path / "run")
    after = run(layout, zero, tmp_path / "run", HALF, STEPS)
    whole = references[True]
    rest = {"loss": whole["loss"][HALF:], "norm": whole["norm"][HALF:], "evaluation": [], "state": whole["state"]}
    assert_close(after, rest)
