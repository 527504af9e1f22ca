"""What this process runs on, and why: device, backend, dtype, threads. Every choice is printed with its reason."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from moetrain.config.schema import RuntimeConfig
from moetrain.errors import DependencyError


@dataclass(frozen=True)
class Decision:
    """A choice that followed from the machine or the config."""

    what: str
    choice: str
    reason: str

    def __str__(self) -> str:
        return f"{self.what}: {self.choice} ({self.reason})"


@dataclass(frozen=True)
class Processes:
    """This process among its peers, as torchrun's environment variables tell; alone without them."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_environment(cls) -> Processes:
        """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        return cls(
            rank=int(os.environ.get("RANK", "0")),
            world_size=size,
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", str(size))),
        )


@dataclass(frozen=True)
class Machine:
    """The outcome of `prepare_machine`."""

    processes: Processes
    device: torch.device
    backend: str
    decisions: list[Decision] = field(default_factory=list)


def prepare_machine(config: RuntimeConfig) -> Machine:
    """Choose device, backend and threads, and apply them to this process. No communication.

    Raises:
        DependencyError: the config insists on CUDA or NCCL and this machine has none.
    """
    processes = Processes.from_environment()
    device, device_reason = _choose_device(config, processes)
    backend, backend_reason = _choose_backend(config, device)
    decisions = [
        Decision("device", str(device), device_reason),
        Decision("backend", backend, backend_reason),
    ]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        cores = len(os.sched_getaffinity(0))
        share = max(1, cores // processes.local_world_size)
        threads = config.cpu_threads or share
        torch.set_num_threads(threads)
        reason = (
            "runtime.cpu_threads"
            if config.cpu_threads
            else f"{cores} cores for {processes.local_world_size} local processes"
        )
        decisions.append(Decision("CPU threads", str(threads), reason))
    return Machine(processes, device, backend, decisions)


def join_processes(machine: Machine, config: RuntimeConfig) -> None:
    """Create the default process group over all ranks of the launch. Collective."""
    processes = machine.processes
    timeout = timedelta(minutes=config.timeout_minutes)
    if "RANK" in os.environ:
        dist.init_process_group(
            machine.backend, timeout=timeout, device_id=machine.device if machine.device.type == "cuda" else None
        )
    else:
        dist.init_process_group(
            machine.backend,
            store=dist.HashStore(),  # pyright: ignore[reportPrivateImportUsage]
            rank=processes.rank,
            world_size=1,
            timeout=timeout,
        )


def _choose_device(config: RuntimeConfig, processes: Processes) -> tuple[torch.device, str]:
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise DependencyError(
            f"runtime.device is cuda, but torch {torch.__version__} sees no CUDA device; legal here: auto, cpu "
            "(`moetrain doctor` says what is missing)"
        )
    if config.device == "cpu" or not available:
        return torch.device("cpu"), "runtime.device is cpu" if config.device == "cpu" else "torch sees no CUDA device"
    if processes.local_rank >= torch.cuda.device_count():
        raise DependencyError(
            f"local rank {processes.local_rank} has no GPU of its own: this machine has {torch.cuda.device_count()}; "
            "start at most one process per GPU"
        )
    name = torch.cuda.get_device_name(processes.local_rank)
    return torch.device("cuda", processes.local_rank), f"{name}, one per local rank"


def _choose_backend(config: RuntimeConfig, device: torch.device) -> tuple[str, str]:
    wanted = "nccl" if device.type == "cuda" else "gloo"
    if config.backend not in ("auto", wanted):
        raise DependencyError(
            f"runtime.backend is {config.backend}, but tensors lie on {device.type}; legal with it: auto, {wanted}"
        )
    return wanted, f"tensors lie on {device.type}"
