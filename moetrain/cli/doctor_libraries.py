"""What `moetrain doctor` finds out about Python packages and our compiled operators.

Packages are looked up by their metadata and files: nothing but torch and our own operators is imported, so an impostor
never runs and a slow import never has to be waited for.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from moetrain.runtime.fused_adam import cpu_adam_is_built, find_apex


@dataclass(frozen=True)
class Finding:
    """One piece of the machine. `effect` says what it changes for a run that it is there, or that it is not."""

    name: str
    status: Literal["ok", "missing", "wrong"]
    found: str
    effect: str
    required: bool = False


def library_findings() -> Iterator[Finding]:
    """Python and everything that pip installs, in the order of need."""
    yield _python()
    yield from _torch()
    yield _extension()
    yield _package(
        "megatron-core", "the parallel layers and pipeline schedules that every model is made of", required=True
    )
    yield from _deepspeed()
    yield apex_finding()
    yield _package(
        "transformer-engine",
        "Megatron's FP8 and fused layers; moetrain builds Megatron's plain layers and does not need it",
    )
    yield _package("sentencepiece", "training and reading .model tokenizers (`moetrain data tokenizer`)", required=True)
    yield _package("tokenizers", "reading Hugging Face tokenizer.json files", required=True)
    yield _package("transformers", "`moetrain convert` and loading an exported model; training does not need it")
    yield _package("tensorboard", "the curves of a run; `moetrain train` writes them always", required=True)


def apex_finding() -> Finding:
    """NVIDIA's apex, or what stands under its name."""
    kind, version = find_apex(), _version("apex")
    without = "optimizer.type auto takes torch's fused AdamW on GPU; apex_fused_adam is refused"
    if kind == "usable":
        return Finding("NVIDIA apex", "ok", version or "present", "optimizer.type auto takes its FusedAdam on GPU")
    if kind == "without kernels":
        return Finding("NVIDIA apex", "wrong", f"{version or 'present'}, built without its CUDA kernels", without)
    if kind == "impostor" or version:
        found = (
            f"a package named apex {version or ''} without apex.optimizers: not NVIDIA's, but PyPI's of the same name"
        )
        return Finding(
            "NVIDIA apex", "wrong", found, f"{without}; `pip uninstall apex`, then build NVIDIA's from source"
        )
    return Finding("NVIDIA apex", "missing", "", without)


def _python() -> Finding:
    found = f"{platform.python_implementation()} {platform.python_version()}"
    status = "ok" if sys.version_info >= (3, 11) else "wrong"
    return Finding("Python", status, found, "3.11 or newer is required", required=True)


def _torch() -> Iterator[Finding]:
    try:
        import torch
        import torch.distributed as dist
    except ImportError as error:
        yield Finding("torch", "missing", str(error), "nothing runs without it", required=True)
        return
    problem = _version_problem("torch")
    abi = "C++11 ABI" if torch.compiled_with_cxx11_abi() else "pre-C++11 ABI"
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    effect = problem or "tensors, autograd and process groups; our operators must be built against this very torch"
    yield Finding("torch", "wrong" if problem else "ok", f"{torch.__version__}, {build}, {abi}", effect, required=True)
    yield _devices(torch)
    for name, available, effect in (
        ("gloo", dist.is_available() and dist.is_gloo_available(), "communication between CPU ranks"),
        (
            "NCCL",
            dist.is_available() and dist.is_nccl_available(),
            "communication between GPU ranks; without it: CPU runs only",
        ),
    ):
        yield Finding(
            name, "ok" if available else "missing", "in this torch" if available else "", effect, name == "gloo"
        )


def _devices(torch: object) -> Finding:
    cuda = torch.cuda  # pyright: ignore[reportAttributeAccessIssue]
    if not cuda.is_available():
        return Finding("CUDA devices", "missing", "", "runtime.device auto means cpu: everything runs, slowly")
    names: dict[str, int] = {}
    for index in range(cuda.device_count()):
        properties = cuda.get_device_properties(index)
        label = f"{properties.name} {properties.total_memory / 2**30:.0f} GiB"
        names[label] = names.get(label, 0) + 1
    found = ", ".join(f"{count} x {label}" for label, count in names.items())
    return Finding("CUDA devices", "ok", found, "runtime.device auto means cuda, one rank per device")


def _extension() -> Finding:
    effect = "the compiled operators of the MoE layer; without them no model can be built"
    try:
        from moetrain.ops.library import extension_info
    except (ImportError, OSError) as error:
        return Finding("moetrain operators", "missing", str(error), effect, required=True)
    info = extension_info()
    cuda = "CPU and CUDA kernels" if info.cuda else "CPU kernels only"
    found = f"{info.path}, {cuda}, CPU instructions {info.cpu_isa}, built with torch {info.built_with_torch}"
    return Finding("moetrain operators", "ok", found, effect, required=True)


def _deepspeed() -> Iterator[Finding]:
    yield _package("deepspeed", "ZeRO: owns and partitions the optimizer state", required=True)
    if _version("deepspeed") is None:
        return
    if cpu_adam_is_built():
        effect = "optimizer.type cpu_adam may ask for it; auto takes torch's AdamW"
        yield Finding("DeepSpeed CPU Adam", "ok", "built with DeepSpeed", effect)
        return
    effect = (
        "optimizer.type auto takes torch's AdamW on CPU; cpu_adam is refused, because compiling it at start-up can "
        "hang a run. To have it: reinstall DeepSpeed with DS_BUILD_CPU_ADAM=1"
    )
    yield Finding("DeepSpeed CPU Adam", "missing", "", effect)


def _package(name: str, effect: str, required: bool = False) -> Finding:
    version = _version(name)
    if version is None:
        return Finding(name, "missing", "", effect, required)
    problem = _version_problem(name)
    return Finding(name, "wrong" if problem else "ok", version, problem or effect, required)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _version_problem(name: str) -> str | None:
    """Why the installed version does not do, by moetrain's own requirements; None when it does or nothing is known."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(line) for line in importlib.metadata.requires("moetrain") or []]
    except importlib.metadata.PackageNotFoundError:
        return None
    version = _version(name)
    for requirement in requirements:
        if requirement.name == name and version and not requirement.specifier.contains(version, prereleases=True):
            return f"moetrain {importlib.metadata.version('moetrain')} is made for {name} {requirement.specifier}"
    return None
