"""What `moetrain doctor` finds out about the machine: compilers, cores, memory, disk, limits, Slurm."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from moetrain.cli.doctor_libraries import Finding

_GIB = 2**30
_MIN_OPEN_FILES = 4096
_MIN_FREE_DISK = 10 * _GIB


def machine_findings() -> Iterator[Finding]:
    """Everything that pip does not install. None of it is required of an installed moetrain."""
    yield _compiler(
        "C++ compiler", [os.environ.get("CXX"), "c++", "g++", "clang++"], "building our operators from source"
    )
    yield _compiler("nvcc", [_nvcc_of_cuda_home(), "nvcc"], "building our CUDA kernels; a CPU build does without")
    yield _processors()
    yield _disk()
    yield _open_files()
    yield _slurm()


def _compiler(name: str, candidates: list[str | None], effect: str) -> Finding:
    path = next((found for candidate in candidates if candidate and (found := shutil.which(candidate))), None)
    if path is None:
        return Finding(name, "missing", "", effect)
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return Finding(name, "wrong", f"{path}: {error}", effect)
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    version = next((line for line in lines if "release" in line), lines[0] if lines else "")
    return Finding(name, "ok", f"{version} ({path})", effect)


def _nvcc_of_cuda_home() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return str(Path(home, "bin", "nvcc")) if home else None


def _processors() -> Finding:
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    effect = "a CPU rank takes cores / local ranks threads (runtime.cpu_threads) and about 0.5 GiB before the model"
    return Finding("cores and memory", "ok", f"{cores} cores for this process, {memory / _GIB:.0f} GiB", effect)


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    effect = "a checkpoint takes 12 bytes per parameter; checkpoint.keep_* says how many are kept"
    status = "ok" if free >= _MIN_FREE_DISK else "wrong"
    return Finding("disk", status, f"{free / _GIB:.0f} GiB free under {Path.cwd()}", effect)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = soft == resource.RLIM_INFINITY
    status = "ok" if unlimited or soft >= _MIN_OPEN_FILES else "wrong"
    effect = "each peer rank takes sockets and each data file a descriptor; large runs fail with EMFILE when it is low"
    if status == "wrong":
        effect += f": `ulimit -n {_MIN_OPEN_FILES}` before the start"
    return Finding("open files", status, f"{'unlimited' if unlimited else soft} (hard limit {hard})", effect)


def _slurm() -> Finding:
    found = [command for command in ("sbatch", "srun", "scontrol") if shutil.which(command)]
    effect = "`moetrain launch slurm --submit`; without it, `moetrain launch local` and --dry-run work"
    status = "ok" if len(found) == 3 else "wrong" if found else "missing"
    return Finding("Slurm", status, ", ".join(found), effect)
