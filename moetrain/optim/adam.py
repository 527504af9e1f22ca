"""Which Adam updates the fp32 masters, and why."""

from __future__ import annotations

from typing import Any

import torch

from moetrain.config.schema import OptimizerConfig
from moetrain.errors import DependencyError
from moetrain.runtime.fused_adam import cpu_adam_is_built, find_apex


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
        from apex.optimizers import FusedAdam  # pyright: ignore[reportMissingImports]

        return FusedAdam(param_groups, adam_w_mode=True, **settings), reason
    if kind == "cpu_adam":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(param_groups, adamw_mode=True, **settings), reason
    return torch.optim.AdamW(param_groups, fused=True, **settings), reason


def _choose(config: OptimizerConfig, device: torch.device) -> tuple[str, str]:
    kind = config.type
    if kind == "auto":
        if device.type == "cuda" and find_apex() == "usable":
            return "apex_fused_adam", "apex FusedAdam: NVIDIA apex is installed"
        # On CPU, DeepSpeed's own is about as fast as torch's (0.7 to 1.2 of its time, see docs/log.md), and starts a
        # subprocess in every rank to learn the processor's name.
        return "adamw", f"torch's fused AdamW: the default on {device.type}"
    if kind == "apex_fused_adam" and (device.type != "cuda" or find_apex() != "usable"):
        raise DependencyError(
            "optimizer.type apex_fused_adam needs a CUDA device and NVIDIA apex built from source (PyPI's `apex` is an "
            f"unrelated package); device is {device.type}; legal here: auto, adamw, cpu_adam"
        )
    if kind == "cpu_adam" and (device.type != "cpu" or not cpu_adam_is_built()):
        raise DependencyError(
            "optimizer.type cpu_adam needs device cpu and DeepSpeed installed with DS_BUILD_CPU_ADAM=1, so that "
            f"nothing is compiled at start-up; device is {device.type}; legal here: auto, adamw"
        )
    return kind, f"{kind}: set by optimizer.type"
