"""H6: how much slower a step of HyperMoE is than one of the plain MoE, in each form of evaluation.

The paper says about 15 % in training (section 1). Steps of the models alternate in one process on the same tokens, and
ratios are taken within a round, so that a machine that changes its pace changes both.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
import torch.distributed as dist

from moetrain.config.layout import ParallelLayout
from moetrain.config.schema import RunConfig
from moetrain.data.loader import MicroBatch
from moetrain.runtime.environment import join_processes, prepare_machine
from moetrain.runtime.groups import create_groups, destroy_groups
from moetrain.train.setup import build_step

FORMS = ("grouped", "factorized", "per_token")


@dataclass(frozen=True)
class Ratio:
    """Time of a step over that of the plain MoE: median and quartiles over rounds."""

    median: float
    low: float
    high: float


def measure_throughput(configs: Mapping[str, RunConfig], plain: str, rounds: int) -> dict[str, Ratio]:
    """Of every config but `plain`, over `plain`. In a process of its own, so that no call leaves anything behind."""
    with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as pool:
        seconds = pool.submit(_step_seconds, list(configs.values()), rounds).result()
    times = dict(zip(configs, seconds, strict=True))
    return {name: _ratio(times[name], times[plain]) for name in configs if name != plain}


def with_form(base: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """`base` with a hyper-expert of these settings."""
    tree = base.model_dump(mode="json")
    tree["model"]["moe"]["hyper"] = dict(settings)
    return RunConfig.model_validate(tree)


def _ratio(times: Sequence[float], plain: Sequence[float]) -> Ratio:
    low, median, high = statistics.quantiles([a / b for a, b in zip(times, plain, strict=True)], n=4)
    return Ratio(median, low, high)


def _step_seconds(configs: Sequence[RunConfig], rounds: int) -> list[list[float]]:
    """Seconds of a step of each config, in each round; one more round comes first and does not count."""
    machine = prepare_machine(configs[0].runtime)
    join_processes(machine, configs[0].runtime)
    groups = create_groups(ParallelLayout(1), seed=1)
    steps = [build_step(config, groups, machine.device) for config in configs]
    batches = [_batch(config) for config in configs]
    times: list[list[float]] = [[] for _ in configs]
    for round_number in range(rounds + 1):
        for step, batch, seconds in zip(steps, batches, times, strict=True):
            begun = time.perf_counter()
            step.run(batch, lr=1e-4)
            if round_number:
                seconds.append(time.perf_counter() - begun)
    destroy_groups()
    dist.destroy_process_group()
    return times


def _batch(config: RunConfig) -> list[MicroBatch]:
    """Random tokens: what they are makes no difference to the time but through routing, which is random too."""
    training, model = config.training, config.model
    size = (training.global_batch_size, model.seq_length + 1)
    rows = torch.randint(0, model.vocab_size, size, generator=torch.Generator().manual_seed(0))
    return [
        MicroBatch(tokens=part[:, :-1].contiguous(), labels=part[:, 1:].contiguous())
        for part in rows.split(training.micro_batch_size)
    ]
