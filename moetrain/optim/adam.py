"""Which Adam updates the fp32 masters, and why."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from moetrain.config.schema import OptimizerConfig
from moetrain.errors import DependencyError


def apex_fused_adam() -> Any | None:
    """NVIDIA apex's FusedAdam class, or None. PyPI's unrelated package named `apex` has no `apex.optimizers`."""
    try:
        found = importlib.util.find_spec("apex.optimizers")
    except ModuleNotFoundError:
        return None
    if found is None:
        return None
    from apex.optimizers import FusedAdam  # pyright: ignore[reportMissingImports]

    return FusedAdam


def cpu_adam_is_built() -> bool:
    """Whether DeepSpeed was installed with its CPU Adam compiled (DS_BUILD_CPU_ADAM=1), so that nothing compiles now."""
    return importlib.util.find_spec("deepspeed.ops.adam.cpu_adam_op") is not None


def create_adam(
    param_groups: list[dict[str, Any]], config: OptimizerConfig, device: torch.device
) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer over `param_groups`, and one sentence on which it is and why.

    Raises:
        DependencyError: `optimizer.type` names one that is not installed or does not fit the device.
    """
    kind, reason = _choose(config, device)
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if kind == "apex_fused_adam":
        fused_adam = apex_fused_adam()
        assert fused_adam is not None
        return fused_adam(param_groups, adam_w_mode=True, **settings), reason
    if kind == "cpu_adam":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(param_groups, adamw_mode=True, **settings), reason
    return torch.optim.AdamW(param_groups, fused=True, **settings), reason


def _choose(config: OptimizerConfig, device: torch.device) -> tuple[str, str]:
    kind = config.type
    if kind == "auto":
        if device.type == "cuda" and apex_fused_adam() is not None:
            return "apex_fused_adam", "apex FusedAdam: NVIDIA apex is installed"
        if device.type == "cpu" and cpu_adam_is_built():
            return "cpu_adam", "DeepSpeed CPU Adam: CPU, and DeepSpeed was installed with it compiled"
        return "adamw", f"torch fused AdamW: no faster one is installed for {device.type}"
    if kind == "apex_fused_adam" and (device.type != "cuda" or apex_fused_adam() is None):
        raise DependencyError(
            "optimizer.type apex_fused_adam needs a CUDA device and NVIDIA apex built from source (PyPI's `apex` is an "
            f"unrelated package); device is {device.type}; legal here: auto, adamw, cpu_adam"
        )
    if kind == "cpu_adam" and (device.type != "cpu" or not cpu_adam_is_built()):
        raise DependencyError(
            "optimizer.type cpu_adam needs device cpu and DeepSpeed installed with DS_BUILD_CPU_ADAM=1, so that nothing is "
            f"compiled at start-up; device is {device.type}; legal here: auto, adamw"
        )
    return kind, f"{kind}: set by optimizer.type"
