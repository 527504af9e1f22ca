"""DeepSpeed's JSON, generated from a `RunConfig`.

One setting has one home. What moetrain already has a name for is generated from that name; what only DeepSpeed knows
goes into the `deepspeed:` section and is merged in. A key there that contradicts ours is refused with our setting's
name, and a key that would have no effect in the way moetrain drives DeepSpeed (the ZeRO optimizer under Megatron's
schedule, without DeepSpeed's engine) is refused rather than ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from moetrain.config.layout import ParallelLayout
from moetrain.config.schema import RunConfig

_ZERO = "zero_optimization"

# Keys that are ours, and the setting that decides each.
_OWNED = {
    ("train_batch_size",): "training.global_batch_size",
    ("train_micro_batch_size_per_gpu",): "training.micro_batch_size",
    ("gradient_accumulation_steps",): "training.global_batch_size and training.micro_batch_size",
    ("gradient_clipping",): "optimizer.clip_grad",
    ("steps_per_print",): "training.log_interval",
    ("bf16", "enabled"): "training.precision",
    ("fp16", "enabled"): "training.precision",
    ("data_types", "grad_accum_dtype"): "training.precision",
    ("optimizer",): "optimizer",
    ("scheduler",): "optimizer.schedule",
    (_ZERO, "stage"): "zero.stage",
    (_ZERO, "reduce_bucket_size"): "zero.reduce_bucket_size",
}

# Arguments of DeepSpeedZeroOptimizer.__init__ (deepspeed/runtime/zero/stage_1_and_2.py) that are the user's to choose.
# Not among them: contiguous_gradients (experts are reduced over the wrong group without it, so it is always on) and,
# below stage 2, overlap_comm (it reduces in each backward pass; a step has several and is reduced once, at its end).
_STAGE_0_AND_1: dict[str, type] = {
    "allgather_bucket_size": int,
    "parameter_alignment": bool,
    "reduce_scatter": bool,
    "round_robin_gradients": bool,
    "use_multi_rank_bucket_allreduce": bool,
}
_STAGE_2: dict[str, type] = {**_STAGE_0_AND_1, "overlap_comm": bool}

# Arguments of DeepSpeedZeroOptimizer_Stage3.__init__ (deepspeed/runtime/zero/stage3.py), by their JSON names. Not among
# them: stage3_module_granularity_threshold; the modules that it would gather whole must get their inputs by position,
# and Megatron's layers get them by keyword.
_STAGE_3: dict[str, type] = {
    "contiguous_gradients": bool,
    "overlap_comm": bool,
    "reduce_scatter": bool,
    "stage3_max_live_parameters": int,
    "stage3_max_reuse_distance": int,
    "stage3_model_persistence_threshold": int,
    "stage3_param_persistence_threshold": int,
    "stage3_prefetch_bucket_size": int,
    "sub_group_size": int,
}


def deepspeed_config(config: RunConfig, layout: ParallelLayout) -> dict[str, Any]:
    """DeepSpeed's JSON for this run on this layout, the `deepspeed:` section merged in.

    `gradient_accumulation_steps` is 1 whatever the number of micro-batches: Megatron's schedule accumulates and has
    divided the loss already. DeepSpeed requires train_batch_size = micro x steps x data-parallel ranks, so its "micro
    batch" is all that one rank sees in a step.
    """
    settings = _generated(config)
    settings["train_micro_batch_size_per_gpu"] = config.training.global_batch_size // layout.data
    return _merged(settings, config.deepspeed)


def zero_settings(stage: int) -> dict[str, type]:
    """The keys of `deepspeed.zero_optimization` that take effect at this ZeRO stage, and their types."""
    return dict({2: _STAGE_2, 3: _STAGE_3}.get(stage, _STAGE_0_AND_1))


def deepspeed_problems(config: RunConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """What is wrong with the `deepspeed:` section: (path of the key, sentence)."""
    generated = _generated(config)
    for path, value in _leaves(config.deepspeed):
        owner = next((owned for owned in _OWNED if path[: len(owned)] == owned), None)
        if owner is None:
            problem = _choice_problem(path, value, config)
        elif json.dumps(_lookup(generated, path)) == json.dumps(value):  # as JSON, because 1 == True in Python
            problem = None
        else:
            problem = f"contradicts {_OWNED[owner]}; set that instead"
        if problem is not None:
            yield ("deepspeed", *path), f"{'.'.join(('deepspeed', *path))}: {json.dumps(value)} {problem}"


def _choice_problem(path: tuple[str, ...], value: Any, config: RunConfig) -> str | None:
    """What is wrong with a key that is the user's to choose, if anything."""
    stage, key = config.zero.stage, path[-1]
    legal = zero_settings(stage)
    if path[:-1] != (_ZERO,) or key not in legal:
        return (
            "would have no effect, because moetrain drives the ZeRO optimizer without DeepSpeed's engine; "
            f"legal in deepspeed.{_ZERO} with zero.stage {stage}: {', '.join(legal)}"
        )
    if legal[key] is bool and not isinstance(value, bool):
        return "must be true or false"
    least = 0 if key.startswith("stage3_") else 1
    if legal[key] is int and (type(value) is not int or value < least):
        return f"must be a whole number of at least {least}"
    if key == "reduce_scatter" and value is False and config.model.moe is not None:
        return (
            "must be true for a model with experts: without it DeepSpeed averages them over dense data-parallel ranks"
        )
    return None


def _generated(config: RunConfig) -> dict[str, Any]:
    """All that follows from the config without a layout."""
    return {
        "train_batch_size": config.training.global_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.clip_grad,
        "steps_per_print": config.training.log_interval,
        "bf16": {"enabled": config.training.precision == "bf16"},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        _ZERO: {"stage": config.zero.stage, "reduce_bucket_size": config.zero.reduce_bucket_size, **_defaults(config)},
    }


def _defaults(config: RunConfig) -> dict[str, Any]:
    """ZeRO settings for which DeepSpeed's own default does not suit; the user may change them."""
    if config.zero.stage == 3:
        return {"overlap_comm": False}  # DeepSpeed turns it on here by itself
    # DeepSpeed gathers half a billion elements at a time by default; tie it to the bucket that the user did choose.
    return {"overlap_comm": False, "allgather_bucket_size": config.zero.reduce_bucket_size}


def _leaves(tree: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _lookup(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _merged(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
