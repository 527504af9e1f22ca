"""DeepSpeed ZeRO under Megatron's schedules. The only file that knows both; docs/adr/0001-zero-seam.md says why so.

Megatron's schedule runs forward and backward over the raw model chunks and leaves gradients that are already divided by
the number of micro-batches. `ZeroOptimizer` then
  1. lets DeepSpeed average them over the (expert-)data-parallel ranks and keep this rank's partition,
  2. adds, on that partition, what other tensor ranks and pipeline stages hold of the same parameter,
  3. takes one norm over everything, each parameter counted once, and
  4. lets DeepSpeed clip, step and gather.

Step 2 works on partitions because parameters that need the same sums share a parameter group: the ranks to be added up
hold groups of equal content, so ZeRO cuts them at equal places. It costs 1/dp of the usual traffic, and it works for
ZeRO-2, whose whole gradients are gone by then.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    # Read when DeepSpeed is imported: it would otherwise look for hardware and warn that it found none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils.timer import NoopTimer
from torch import Tensor

from moetrain.config.schema import OptimizerConfig
from moetrain.optim.adam import create_adam
from moetrain.runtime.groups import ParallelGroups, create_stage_groups
from moetrain.runtime.parameters import ParameterInfo, Tie

_SHARED_BY_LAYERS = ("hypernetwork", "selection_embedding.", "router_gru.", "relative_positions.")
_EXPERTS = "experts"  # DeepSpeed finds an expert parameter's groups under its `group_name`


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        grad_norm: global L2 norm before clipping; inf or nan when a gradient was not finite.
        skipped: whether the step was dropped for it; weights and moments are then unchanged.
    """

    grad_norm: float
    skipped: bool


@dataclass(frozen=True)
class Fragment:
    """The part of one parameter's optimizer state that this rank owns.

    `start` counts elements from the beginning of the local parameter, row-major. The tensors are flat fp32 views of
    ZeRO's own memory: writing them is loading.
    """

    info: ParameterInfo
    start: int
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


@dataclass(frozen=True)
class GroupKey:
    """Parameters with the same key go through the same reductions."""

    expert: bool
    decay: bool
    sum_over_tensor: bool
    tied: Tie


class _Mpu:
    """DeepSpeed's view of the process groups. It must not offer `initialize_sequence_parallel`: DeepSpeed would then
    drop the model-parallel group."""

    def __init__(self, groups: ParallelGroups, data: dist.ProcessGroup) -> None:
        self._groups = {
            "data_parallel": data,
            "model_parallel": groups.model,
            "tensor_model_parallel": groups.tensor,
            "pipeline_model_parallel": groups.pipeline,
        }
        for name, group in self._groups.items():
            setattr(self, f"get_{name}_group", lambda group=group: group)
            setattr(self, f"get_{name}_world_size", lambda group=group: group.size())
            setattr(self, f"get_{name}_rank", lambda group=group: group.rank())


class _Zero(DeepSpeedZeroOptimizer):
    """DeepSpeed's ZeRO-1/2 with our norm, and with shared parameters reduced once per micro-batch."""

    moetrain_norm: Tensor
    moetrain_shared: frozenset[int] = frozenset()

    def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
        return self.moetrain_norm

    def process_gradients(self, param: torch.nn.Parameter, i: int) -> None:
        # A parameter that several recomputed layers use gets one gradient hook per layer; ZeRO-2 would reduce it at
        # the first and fail at the second. It waits for `close_microbatch`.
        if id(param) not in self.moetrain_shared:
            super().process_gradients(param, i)


class ZeroOptimizer:
    """ZeRO stages 0, 1 and 2 for this rank's parameters. Stage 0 is ZeRO over a group of one: nothing is partitioned,
    and the data-parallel average is one more of the sums of step 2."""

    def __init__(
        self,
        parameters: list[ParameterInfo],
        groups: ParallelGroups,
        config: OptimizerConfig,
        deepspeed_config: dict[str, Any],
        device: torch.device,
    ) -> None:
        """`deepspeed_config` is the generated DeepSpeed JSON; its `zero_optimization` section takes effect here."""
        zero = dict(deepspeed_config["zero_optimization"])
        self.stage: int = zero.pop("stage")
        assert self.stage in (0, 1, 2), "stage 3 has its own class"
        self.groups = groups
        self.infos = {id(info.parameter): info for info in parameters}
        grouped = group_parameters(parameters)
        self.keys = list(grouped)
        ties = {key.tied for key in self.keys if isinstance(key.tied, tuple)}
        self._stage_groups = create_stage_groups(groups, ties)
        total = sum(info.parameter.numel() for info in parameters)
        # A bucket is a buffer: larger than all gradients together it would only waste memory.
        zero["reduce_bucket_size"] = max(1, min(int(zero.get("reduce_bucket_size", total)), total))
        # DeepSpeed asserts an even size, for the alignment of half-precision sends.
        zero["allgather_bucket_size"] = 2 * -(-int(zero.get("allgather_bucket_size", total)) // 2)
        base, self.adam_reason = create_adam([adam_group(k, v, config) for k, v in grouped.items()], config, device)
        self._zero = self._create(base, parameters, zero, config)
        create_adam_state(self._zero.optimizer, self._adam_flats())

    def _create(
        self,
        base: torch.optim.Optimizer,
        parameters: list[ParameterInfo],
        zero: dict[str, Any],
        config: OptimizerConfig,
    ) -> _Zero:
        init_deepspeed_comm()
        alone = self.stage == 0
        data = self.groups.alone if alone else self.groups.data
        expert_data = self.groups.alone if alone else self.groups.expert_data
        has_experts = any(key.expert for key in self.keys)
        optimizer = _Zero(
            base,
            {info.parameter: info.name for info in parameters},
            NoopTimer(),
            {},
            verbose=False,
            contiguous_gradients=True,  # without it DeepSpeed reduces experts over the dense group
            dp_process_group=data,
            expert_parallel_group={_EXPERTS: self.groups.expert} if has_experts else None,
            expert_data_parallel_group={_EXPERTS: expert_data} if has_experts else None,
            has_moe_layers=has_experts,
            mpu=_Mpu(self.groups, data),
            clip_grad=config.clip_grad,
            gradient_accumulation_dtype=torch.float32,
            communication_data_type=torch.float32,
            # Megatron's schedule has divided by the micro-batches already.
            gradient_accumulation_steps=1,
            partition_grads=self.stage == 2,
            check_grad_overflow=False,  # our norm tells
            **zero,
        )
        if self.stage == 2:
            optimizer.moetrain_shared = frozenset(
                id(info.parameter) for info in parameters if info.name.startswith(_SHARED_BY_LAYERS)
            )
        return optimizer

    def _adam_flats(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Adam's parameter groups, each with the flat fp32 partition that it updates."""
        return zip(self._zero.optimizer.param_groups, self._zero.single_partition_of_fp32_groups, strict=True)

    # --- a training step ----------------------------------------------------------------------------------------

    def watch_microbatch(self, output: Tensor) -> None:
        """ZeRO-2 only: reduce and partition a micro-batch's gradients as soon as its backward pass has finished.

        Call it on the output of every forward pass of every model chunk.
        """
        if self.stage != 2 or not output.requires_grad:
            return

        def close() -> None:
            self._zero.set_gradient_accumulation_boundary(False)
            for i, group in enumerate(self._zero.bit16_groups):
                for parameter in group:
                    if id(parameter) in self._zero.moetrain_shared and parameter.grad is not None:
                        DeepSpeedZeroOptimizer.process_gradients(self._zero, parameter, i)
            self._zero.overlapping_partition_gradients_reduce_epilogue()

        def at_start_of_backward(gradient: Tensor) -> None:
            torch.autograd.Variable._execution_engine.queue_callback(close)

        output.register_hook(at_start_of_backward)

    def step(self, lr: float) -> StepResult:
        """Reduce, clip, update. Collective over the world; gradients are cleared."""
        if self.stage == 2:
            self._zero.finalize_gradient_accumulation_boundary()
        else:
            self._zero.set_gradient_accumulation_boundary(True)
            self._zero.reduce_gradients(pipeline_parallel=True)
        for i, key in enumerate(self.keys):
            self._sum_replicas(i, key)
        norm = self._global_norm()
        self._zero.moetrain_norm = norm.float()
        result = StepResult(grad_norm=norm.item(), skipped=not math.isfinite(norm.item()))
        if result.skipped:
            self._drop_gradients()
        else:
            for group in self._zero.optimizer.param_groups:
                group["lr"] = lr
            self._zero.step()
        self._zero.zero_grad()
        self._zero.clear_backward_seen_flag()
        return result

    def _sum_replicas(self, i: int, key: GroupKey) -> None:
        """Add up the parts of this group's gradients that other ranks of the same partition hold."""
        for group, mean_over in self._replica_groups(key):
            if group.size() == 1 and mean_over == 1:
                continue
            sum_gradients(self._gradients(i), group, mean_over)

    def _replica_groups(self, key: GroupKey) -> Iterator[tuple[dist.ProcessGroup, int]]:
        if self.stage == 0:
            # Experts too are averaged over the dense data-parallel size: their tokens came from all of its ranks.
            yield (self.groups.expert_data if key.expert else self.groups.data), self.groups.data.size()
        if key.sum_over_tensor:
            yield self.groups.tensor, 1
        if isinstance(key.tied, tuple):
            yield self._stage_groups[key.tied], 1
        if key.tied == "embedding":
            assert self.groups.embedding is not None
            yield self.groups.embedding, 1

    def _gradients(self, i: int) -> list[Tensor]:
        """Averaged gradients of this rank's partition of group i, in the order of `params_in_partition[i]`."""
        return [g for g in self._zero.averaged_gradients[i] if not getattr(g, "_zero_padding", False)]

    def _global_norm(self) -> Tensor:
        """L2 norm over dense, expert, hyper and tied gradients of the whole model, float64, each element once."""
        device = self._zero.single_partition_of_fp32_groups[0].device
        square = torch.zeros((), dtype=torch.float64, device=device)
        for i, key in enumerate(self.keys):
            replicas = self.groups.expert_data if key.expert else self.groups.data
            if self.stage == 0 and replicas.rank() != 0:
                continue
            # Without parameters in the partition, DeepSpeed's gradient list is one block of padding.
            for parameter, g in zip(self._zero.params_in_partition[i], self._gradients(i), strict=False):
                if self.infos[id(parameter)].counted:
                    square += g.double().square().sum()
        dist.all_reduce(square, group=self.groups.world)
        return square.sqrt()

    def _drop_gradients(self) -> None:
        for i in range(len(self.keys)):
            self._zero.averaged_gradients[i] = None
            self._zero.all_grad_tensors[i] = None

    # --- state for checkpoints ----------------------------------------------------------------------------------

    def fragments(self) -> Iterator[Fragment]:
        """The optimizer state that this rank owns, parameter by parameter."""
        for i, parameters in enumerate(self._zero.round_robin_bit16_groups):
            flat = self._zero.single_partition_of_fp32_groups[i].detach()
            state = self._zero.optimizer.state[self._zero.single_partition_of_fp32_groups[i]]
            size = int(self._zero.partition_size[i])
            first = dist.get_rank(self._zero.real_dp_process_group[i]) * size
            for parameter, offset in zip(parameters, self._zero.round_robin_bit16_offsets[i], strict=True):
                begin, end = max(offset, first), min(offset + parameter.numel(), first + size)
                if begin >= end:
                    continue
                at = slice(begin - first, end - first)
                yield Fragment(
                    info=self.infos[id(parameter)],
                    start=begin - offset,
                    master=flat[at],
                    exp_avg=state["exp_avg"][at],
                    exp_avg_sq=state["exp_avg_sq"][at],
                )

    def stores(self, info: ParameterInfo) -> bool:
        """Whether this rank writes its fragments of a parameter to checkpoints (one of several equal copies does)."""
        replicas = self.groups.expert_data if info.expert else self.groups.data
        return info.counted and (self.stage > 0 or replicas.rank() == 0)

    def finish_load(self, steps: int) -> None:
        """After the fragments were overwritten: set Adam's step count and renew the model's weights from the masters.
        Collective over the (expert-)data-parallel ranks."""
        set_step_count(self._zero.optimizer, self._adam_flats(), steps)
        self._zero.update_lp_params()


def group_parameters(parameters: list[ParameterInfo]) -> dict[GroupKey, list[ParameterInfo]]:
    """Parameters by the reductions they need; groups in an order that does not depend on the rank."""
    grouped: dict[GroupKey, list[ParameterInfo]] = {}
    for info in parameters:
        key = GroupKey(info.expert, info.decay, info.sum_over_tensor, info.tied)
        grouped.setdefault(key, []).append(info)
    return dict(
        sorted(
            grouped.items(),
            key=lambda item: (item[0].expert, str(item[0].tied), item[0].sum_over_tensor, item[0].decay),
        )
    )


def adam_group(key: GroupKey, parameters: list[ParameterInfo], config: OptimizerConfig) -> dict[str, Any]:
    group: dict[str, Any] = {
        "params": [info.parameter for info in parameters],
        "weight_decay": config.weight_decay if key.decay else 0.0,
    }
    if key.expert:
        group |= {"moe": True, "name": _EXPERTS}
        for info in parameters:
            # How Megatron and DeepSpeed both mark an expert.
            info.parameter.allreduce = False  # pyright: ignore[reportAttributeAccessIssue]
            info.parameter.group_name = _EXPERTS  # pyright: ignore[reportAttributeAccessIssue]
    return group


def create_adam_state(optimizer: torch.optim.Optimizer, flats: Iterable[tuple[dict[str, Any], Tensor]]) -> None:
    """Create the moments now rather than at the first step, so that a checkpoint can be loaded into them."""
    flats = list(flats)
    for _, flat in flats:
        optimizer.state[flat]["exp_avg"] = torch.zeros_like(flat, requires_grad=False)
        optimizer.state[flat]["exp_avg_sq"] = torch.zeros_like(flat, requires_grad=False)
    set_step_count(optimizer, flats, 0)


def set_step_count(
    optimizer: torch.optim.Optimizer, flats: Iterable[tuple[dict[str, Any], Tensor]], steps: int
) -> None:
    """Adam's bias correction counts steps per parameter group; each implementation keeps the count elsewhere."""
    for group, flat in flats:
        if isinstance(optimizer, torch.optim.AdamW):
            optimizer.state[flat]["step"] = torch.tensor(float(steps), device=flat.device)
        else:
            optimizer.state[flat]["step"] = steps
            group["step"] = steps


def sum_gradients(gradients: list[Tensor], group: dist.ProcessGroup, divide_by: int = 1) -> None:
    """Add the gradients up over a group, in place and in one message. Collective over the group, whose ranks hold
    partitions of equal content: with nothing here there is nothing anywhere."""
    if not gradients:
        return
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat, group=group)
    if divide_by > 1:
        flat /= divide_by
    start = 0
    for g in gradients:
        g.copy_(flat[start : start + g.numel()].view_as(g))
        start += g.numel()


def init_deepspeed_comm() -> None:
    """Let DeepSpeed use the process group that is there, quietly and without compiling anything."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed would JIT-compile its shared-memory communication op, and a build that was once killed leaves a lock
    # on which every later run waits for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False)
