"""What the numbers were measured on, and the most that it does: nothing in a table means much without."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path

import torch

from moetrain.bench.experts import TORCH_DTYPES
from moetrain.bench.measure import Clock
from moetrain.bench.results import Machine
from moetrain.ops import extension_info

# Instruction sets that a matrix product could use, by the kernel's names.
_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
PEAK_SIZE = {"cpu": 2048, "cuda": 8192}


def describe(device: str) -> Machine:
    """Everything but the peaks."""
    info = extension_info()
    cuda = "CPU and CUDA kernels" if info.cuda else "CPU kernels"
    name, flags = _processor()
    if device == "cuda":
        name = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}; host: {name}"
    return Machine(
        name=name,
        cores=len(os.sched_getaffinity(0)),
        flags=[flag for flag in _FLAGS if flag in flags],
        torch=torch.__version__,
        extension=f"{cuda}, CPU instructions {info.cpu_isa}",
        commit=_commit(),
    )


def _processor() -> tuple[str, set[str]]:
    """Model and flags, as the Linux kernel tells them."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine(), set()
    known = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in known.items()}
    return fields.get("model name", platform.machine()), set(fields.get("flags", "").split())


def _commit() -> str:
    """Of the checkout that tracks this file; empty for an installed package, be it inside another checkout."""
    here = Path(__file__)
    commands = (
        ["ls-files", "--error-unmatch", here.name],
        ["rev-parse", "--short=12", "HEAD"],
        ["status", "--porcelain", "-uno", "--", ":/csrc", ":/moetrain"],
    )
    try:
        _, commit, changes = (
            subprocess.run(["git", *words], cwd=here.parent, capture_output=True, text=True, timeout=20, check=True)
            for words in commands
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit.stdout.strip() + (" with changes" if changes.stdout else "")


def peak_rates(device: str, clock: Clock, seconds: float) -> dict[str, float]:
    """FLOP/s of `torch.mm` of two large square matrices, by dtype: the best of as many as `seconds` allows."""
    size = PEAK_SIZE[device]
    rates = {}
    for dtype, torch_dtype in TORCH_DTYPES.items():
        a, b = (torch.randn(size, size, dtype=torch_dtype, device=device) for _ in range(2))
        torch.mm(a, b)
        end = time.perf_counter() + seconds / len(TORCH_DTYPES)
        best = clock(lambda a=a, b=b: torch.mm(a, b))[1]
        while time.perf_counter() < end:
            best = min(best, clock(lambda a=a, b=b: torch.mm(a, b))[1])
        rates[dtype] = 2.0 * size**3 / best
    return rates
