"""The first gradient of every parameter, before any optimizer has its say, is that of one process.

Weights after Adam hide this: of a gradient that is nothing but rounding Adam makes a whole step, so the parity tests of
some models need a larger epsilon. Here the gradients themselves are compared, by the first moment after one step.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity import LAYOUTS, SINGLE, Layout, layout_of, run_steps, tiny_config

from moetrain.checkpoint.state import ParameterShard
from moetrain.config.schema import RunConfig
from moetrain.runtime.groups import create_groups
from moetrain.testing import run_distributed
from moetrain.train.setup import build_step
from moetrain.train.step import TrainStep

LAYOUT = next(layout for layout in LAYOUTS if layout.name == "tp2+sp x pp2 interleaved x ep2")
PREDICTED = {"type": "da_moe", "importance": "predicted", "mean_k": 2.0}
SIZES = {"bottleneck": 4, "hidden": 8, "expert_embedding": 6, "process": 10, "condition": 8, "layer_embedding": 4}
LATENT = {"q_lora_rank": 11, "kv_lora_rank": 9, "qk_head_dim": 6, "qk_pos_emb_head_dim": 4, "v_head_dim": 7}
HYPER, ROUTER = "model__moe__hyper", "model__moe__router"
VARIANTS: dict[str, dict[str, Any]] = {
    "the parity table's": {},
    "predicted": {ROUTER: PREDICTED},
    "one hypernetwork a layer": {HYPER: SIZES | {"sharing": "layer"}},
    "stages, gated": {HYPER: SIZES | {"sharing": "stage", "stages": 2, "coefficient": "selected_probability"}},
    "by probability": {HYPER: SIZES | {"aggregation": "prob", "embeddings": "model"}},
    "latent attention": {"model__multi_latent_attention": LATENT, "model__num_query_groups": None},
}


def config_of(variant: str, layout: Layout) -> RunConfig:
    return tiny_config(layout, model__moe__layer_freq=[1, 1, 1, 1], **VARIANTS[variant])


def gradients(layout: Layout) -> dict[str, dict[str, torch.Tensor]]:
    """Of every variant, by global name: whole, clipped, fp32."""
    groups = create_groups(layout_of(config_of("predicted", layout)), seed=1)
    found = {}
    for variant in VARIANTS:
        step = build_step(config_of(variant, layout), groups, torch.device("cpu"))
        run_steps(step, range(1))
        found[variant] = whole_first_moments(step)
    return found


def whole_first_moments(step: TrainStep) -> dict[str, torch.Tensor]:
    assert step.optimizer is not None
    mine: list[tuple[str, tuple[int, ...], tuple[slice, ...], torch.Tensor]] = []
    for fragment in step.optimizer.fragments():
        shard = ParameterShard.of(fragment.info)
        for part, rect in shard.fragment(fragment.start, fragment.exp_avg.numel()):
            place = tuple(slice(o, o + n) for o, n in zip(rect.offset, rect.shape, strict=True))
            mine.append((shard.name, shard.global_shape, place, fragment.exp_avg[part].view(rect.shape).clone()))
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    whole: dict[str, torch.Tensor] = {}
    for name, shape, place, values in (entry for entries in everyone for entry in entries):
        whole.setdefault(name, torch.full(shape, float("nan")))[place] = values
    assert not any(tensor.isnan().any() for tensor in whole.values())
    return whole


@pytest.fixture(scope="module")
def both() -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, dict[str, torch.Tensor]]]:
    return run_distributed(gradients, 1, SINGLE)[0], run_distributed(gradients, LAYOUT.world, LAYOUT)[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_gradient_of_every_parameter_is_that_of_one_process(variant: str, both) -> None:
    alone, spread = both[0][variant], both[1][variant]
    assert alone.keys() == spread.keys()
    worst = {name: float((spread[name] - tensor).norm() / tensor.norm()) for name, tensor in alone.items()}
    assert max(worst.values()) <= 1e-5, sorted(worst.items(), key=lambda item: -item[1])[:5]
