"""DeepSpeed ZeRO stage 3 under Megatron's schedule: parameters too are partitioned over the data-parallel ranks.

For dense models without pipeline stages. DeepSpeed hooks every module, gathers its parameters before they are used and
frees them after. Between uses a parameter is empty; what stays on a rank is its part of the weights, fp32 masters,
moments and gradients. The hooks sit on the model itself, so Megatron's schedule drives it as any other.

`ZeroStage3Optimizer` is used as `ZeroOptimizer` is. It differs inside: ZeRO-3 cuts each parameter by itself, and
reduces gradients in every backward pass, adding them up on the partitions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moetrain.config.schema import OptimizerConfig
from moetrain.optim.adam import create_adam
from moetrain.optim.zero import (
    Fragment,
    StepResult,
    adam_group,
    create_adam_state,
    group_parameters,
    init_deepspeed_comm,
    set_step_count,
    sum_gradients,
)
from moetrain.runtime.groups import ParallelGroups
from moetrain.runtime.parameters import ParameterInfo

# After `moetrain.optim.zero`, which tells DeepSpeed of the device before its first import.
from deepspeed.runtime.zero.partition_parameters import Init, register_external_parameter  # isort: skip
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3  # isort: skip
from deepspeed.utils.timer import NoopTimer  # isort: skip


class _Zero3(DeepSpeedZeroOptimizer_Stage3):
    """DeepSpeed's ZeRO-3 with our norm, and with one step count for a parameter group that is updated in pieces."""

    moetrain_norm: Tensor
    moetrain_steps: int = 0

    def _get_norm_groups(self) -> list[Tensor]:
        return [self.moetrain_norm]

    def _optimizer_step(self, sub_group_id: int) -> None:
        # apex counts steps per parameter group, and would count one for every sub-group that it updates.
        group = self.optimizer.param_groups[self.sub_group_to_group_id[sub_group_id]]
        if "step" in group:
            group["step"] = self.moetrain_steps
        super()._optimizer_step(sub_group_id)


class ZeroStage3Optimizer:
    """ZeRO stage 3 for this rank's model; the interface of `ZeroOptimizer`."""

    stage = 3

    def __init__(
        self,
        model: nn.Module,
        borrowed: Sequence[tuple[nn.Module, nn.Parameter]],
        parameters: list[ParameterInfo],
        groups: ParallelGroups,
        config: OptimizerConfig,
        deepspeed_config: dict[str, Any],
        device: torch.device,
    ) -> None:
        """Partition the model in place. Collective over the data-parallel ranks.

        Args:
            model: holds all of `parameters`, initialized. They are empty afterwards.
            borrowed: (module, parameter) where the module uses another module's parameter that it is handed as an
                argument; DeepSpeed gathers by module and would not know.
            deepspeed_config: the generated DeepSpeed JSON; its `zero_optimization` section takes effect here.
        """
        assert not any(info.expert or info.tied != "no" for info in parameters), "the config refuses these at stage 3"
        self.groups = groups
        self.infos = {id(info.parameter): info for info in parameters}
        grouped = group_parameters(parameters)
        self.keys = list(grouped)
        base, self.adam_reason = create_adam([adam_group(k, v, config) for k, v in grouped.items()], config, device)
        self._zero = self._create(model, base, parameters, deepspeed_config["zero_optimization"], config)
        for module, parameter in borrowed:
            register_external_parameter(module, parameter)
        create_adam_state(self._zero.optimizer, self._adam_flats())

    def _create(
        self,
        model: nn.Module,
        base: torch.optim.Optimizer,
        parameters: list[ParameterInfo],
        zero: dict[str, Any],
        config: OptimizerConfig,
    ) -> _Zero3:
        init_deepspeed_comm()
        # Left to the optimizer, this would replace torch.nn.functional.linear for the whole process.
        Init(module=model, data_parallel_group=self.groups.data, mem_efficient_linear=False, dtype=_dtype(model))
        total = sum(math.prod(info.local_shape) for info in parameters)
        settings = {key.removeprefix("stage3_"): value for key, value in zero.items() if key != "stage"}
        # A bucket is a buffer: larger than all gradients together it would only waste memory.
        settings["reduce_bucket_size"] = min(int(settings.get("reduce_bucket_size", total)), total)
        return _Zero3(
            model,
            base,
            {info.parameter: info.name for info in parameters},
            NoopTimer(),
            None,
            verbose=False,
            dp_process_group=self.groups.data,
            clip_grad=config.clip_grad,
            gradient_accumulation_dtype=torch.float32,
            communication_data_type=torch.float32,
            # Megatron's schedule has divided by the micro-batches already.
            gradient_accumulation_steps=1,
            **settings,
        )

    def _adam_flats(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Adam's parameter groups, each with a flat fp32 partition that it updates; a group may have several."""
        for i, flat in enumerate(self._zero.fp32_partitioned_groups_flat):
            yield self._zero.optimizer.param_groups[self._zero.sub_group_to_group_id[i]], flat

    # --- a training step ----------------------------------------------------------------------------------------

    def watch_microbatch(self, output: Tensor) -> None:
        """Close a micro-batch as soon as its backward pass has finished: add its gradients to the partitions, free
        parameters that no later backward hook would free.

        Call it on the output of every forward pass.
        """
        if not output.requires_grad:
            return

        def close() -> None:
            self._zero.independent_gradient_partition_epilogue()
            self._zero.parameter_offload.release_backward_leftovers()
            # Where DeepSpeed counts micro-batches: the first one's gradients overwrite, later ones are added.
            self._zero.clear_backward_seen_flag()

        def at_start_of_backward(gradient: Tensor) -> None:
            torch.autograd.Variable._execution_engine.queue_callback(close)

        output.register_hook(at_start_of_backward)

    def step(self, lr: float) -> StepResult:
        """Clip and update. Collective over the world; gradients are cleared."""
        for i in range(len(self._zero.fp16_groups)):
            if self.keys[self._zero.sub_group_to_group_id[i]].sum_over_tensor:
                sum_gradients(self._zero.averaged_gradients[i], self.groups.tensor)
        norm = self._global_norm()
        self._zero.moetrain_norm = norm.float()
        result = StepResult(grad_norm=norm.item(), skipped=not math.isfinite(norm.item()))
        if result.skipped:
            self._zero.averaged_gradients = {}
        else:
            self._zero.set_lr(lr)
            self._zero.step()
            self._zero.moetrain_steps += 1
        self._zero.zero_grad()
        self._zero.clear_backward_seen_flag()
        return result

    def _global_norm(self) -> Tensor:
        """L2 norm over the gradients of the whole model, float64, each element once; padding is zero."""
        square = torch.zeros((), dtype=torch.float64, device=self._zero.fp32_partitioned_groups_flat[0].device)
        for i, group in enumerate(self._zero.fp16_groups):
            for parameter, gradient in zip(group, self._zero.averaged_gradients[i], strict=True):
                if self.infos[id(parameter)].counted:
                    square += gradient.double().square().sum()
        dist.all_reduce(square, group=self.groups.world)
        return square.sqrt()

    # --- state for checkpoints ----------------------------------------------------------------------------------

    def fragments(self) -> Iterator[Fragment]:
        """The optimizer state that this rank owns, parameter by parameter."""
        rank = self.groups.data.rank()
        for group, (_, trained) in zip(self._zero.fp16_groups, self._adam_flats(), strict=True):
            flat, state, offset = trained.detach(), self._zero.optimizer.state[trained], 0
            for parameter in group:
                size = parameter.partition_numel()
                info = self.infos[id(parameter)]
                length = min(size, math.prod(info.local_shape) - rank * size)  # the last ranks' parts are padded
                if length > 0:
                    at = slice(offset, offset + length)
                    yield Fragment(
                        info=info,
                        start=rank * size,
                        master=flat[at],
                        exp_avg=state["exp_avg"][at],
                        exp_avg_sq=state["exp_avg_sq"][at],
                    )
                offset += size

    def stores(self, info: ParameterInfo) -> bool:
        """Whether this rank writes its fragments of a parameter to checkpoints (one of several equal copies does)."""
        return info.counted

    def finish_load(self, steps: int) -> None:
        """After the fragments were overwritten: set Adam's step count and renew the model's weights from the masters.
        Collective over the data-parallel ranks."""
        set_step_count(self._zero.optimizer, self._adam_flats(), steps)
        self._zero.moetrain_steps = steps
        self._zero._partition_all_parameters()
        for i in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(i)


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype
