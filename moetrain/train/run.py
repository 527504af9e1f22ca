"""One rank of one run, from config to exit."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from moetrain.checkpoint.comm import TorchDistributed
from moetrain.checkpoint.folders import find_step_folder, step_folders
from moetrain.checkpoint.manager import CheckpointManager
from moetrain.config.layout import ParallelLayout, check_layout
from moetrain.config.schema import RunConfig
from moetrain.config.size import flops_per_token, parameter_count
from moetrain.errors import CheckpointError
from moetrain.ops import extension_info
from moetrain.runtime.environment import Decision, Machine, join_processes, prepare_machine
from moetrain.runtime.groups import create_groups
from moetrain.runtime.logs import configure_logs, writing_into
from moetrain.runtime.preemption import forget_old_request
from moetrain.train.callbacks import standard_callbacks
from moetrain.train.data import RunData, open_data
from moetrain.train.metrics import Throughput, peak_flops
from moetrain.train.ownership import sole_run
from moetrain.train.setup import DTYPES, build_step
from moetrain.train.step import TrainStep
from moetrain.train.trainer import Trainer


def train(config: RunConfig) -> None:
    """Train as this process's rank of the launch (torchrun's environment variables; alone without them).

    Everything that can be wrong with the config is told before processes are joined, and everything that can be wrong
    with the data before a model is built.

    Raises:
        MoetrainError: something is the user's to mend; nothing was overwritten.
    """
    machine = prepare_machine(config.runtime)
    layout = check_layout(config, machine.processes.world_size)
    _check_start(config)
    rank, run_dir = machine.processes.rank, Path(config.run.dir)
    if rank == 0:
        with writing_into(run_dir):
            forget_old_request(run_dir)
    join_processes(machine, config.runtime)
    data = open_data(config, rank)
    log = configure_logs(run_dir, rank)
    with sole_run(run_dir, log) if rank == 0 else nullcontext():
        _train(config, layout, machine, data, log)


def _train(config: RunConfig, layout: ParallelLayout, machine: Machine, data: RunData, log: logging.Logger) -> None:
    groups = create_groups(layout, config.training.seed)
    step = build_step(config, groups, machine.device)
    dtype = DTYPES[config.training.precision]
    peak = peak_flops(machine.device, dtype)
    for decision in [*machine.decisions, *_decisions(config, layout, step, dtype)]:
        log.info("%s", decision)
    log.info("peak of a process: %.3g FLOP/s (%s)", peak.value, peak.source)
    trainer = Trainer(
        config,
        step,
        data,
        _checkpoints(config),
        standard_callbacks(),
        Throughput(flops_per_token(config.model), peak, machine.processes.world_size),
        log,
    )
    trainer.fit()
    dist.barrier()
    dist.destroy_process_group()


def _checkpoints(config: RunConfig) -> CheckpointManager:
    """With a process group of its own, on CPU: saves run beside the training's collectives. Collective."""
    settings, timeout = config.checkpoint, timedelta(minutes=config.runtime.timeout_minutes)
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    return CheckpointManager(
        Path(config.run.dir) / "checkpoints",
        settings.keep_last,
        TorchDistributed(group),
        keep_every=settings.keep_every,
        keep_best=settings.keep_best,
        checksum_after_write=settings.verify_after_write == "checksum",
    )


def _check_start(config: RunConfig) -> None:
    """Whether there is a checkpoint where the run is told to begin, if it will look there."""
    load = config.checkpoint.load
    begun = config.checkpoint.resume == "auto" and step_folders(Path(config.run.dir) / "checkpoints")
    if load is not None and not begun:
        try:
            find_step_folder(Path(load))
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint.load: {error}") from error


def _decisions(config: RunConfig, layout: ParallelLayout, step: TrainStep, dtype: torch.dtype) -> list[Decision]:
    assert step.optimizer is not None
    extension = extension_info()
    count = parameter_count(config.model)
    return [
        Decision("layout", layout.describe(), "parallel.*, data parallelism is what remains"),
        Decision("dtype", str(dtype).removeprefix("torch."), "training.precision; masters and gradient sums are fp32"),
        Decision("kernels", f"{extension.path}", f"compiled extension, {extension.cpu_isa}"),
        Decision("optimizer", f"ZeRO-{step.optimizer.stage}", step.optimizer.adam_reason),
        Decision("model", f"{count.total:,} parameters", f"{count.active_per_token:,} active per token"),
    ]
