"""Learning-rate schedules: pure functions of the iteration, so a resumed run needs no scheduler state.

Iterations are 0-based: `iteration` is the number of steps already done when the step begins. Warm-up counts the step
itself, so no step is ever taken at a rate of zero; decay reaches `min_lr` after its last step, so a run that decays to
zero does not waste that step either. The shapes are those of Megatron-LM's `OptimizerParamScheduler`.
"""

from __future__ import annotations

import math

from moetrain.config.schema import ScheduleConfig
from moetrain.errors import ConfigError

_WHERE = "optimizer.schedule"


def learning_rate(schedule: ScheduleConfig, peak_lr: float, train_iters: int, iteration: int) -> float:
    """The rate of the step that begins after `iteration` steps.

    Linear warm-up to `peak_lr` over `warmup_iters` (the first step uses `peak_lr / warmup_iters`), then:

    - `constant`: `peak_lr` for ever;
    - `linear`, `cosine`: down to `min_lr` at `decay_iters` (default `train_iters`), and `min_lr` from there on;
    - `wsd`: `peak_lr`, then linearly down to `min_lr` over the last `decay_iters` iterations (default a fifth of
      `train_iters`, or what warm-up leaves of them).

    The schedule must have passed `check_schedule`.
    """
    assert iteration >= 0, iteration
    if iteration < schedule.warmup_iters:
        return peak_lr * (iteration + 1) / schedule.warmup_iters
    if schedule.type == "constant":
        return peak_lr
    start, end = _decay_span(schedule, train_iters)
    if iteration <= start < end:
        return peak_lr
    if iteration >= end:
        return schedule.min_lr
    remaining = (end - iteration) / (end - start)
    if schedule.type == "cosine":
        remaining = 0.5 * (1.0 - math.cos(math.pi * remaining))
    return schedule.min_lr + (peak_lr - schedule.min_lr) * remaining


def check_schedule(schedule: ScheduleConfig, peak_lr: float, train_iters: int) -> None:
    """Refuses a schedule that cannot be followed as written. Raises ConfigError naming the setting."""
    warmup, decay = schedule.warmup_iters, schedule.decay_iters
    if warmup > train_iters:
        raise ConfigError(
            f"{_WHERE}.warmup_iters ({warmup}) must not exceed training.train_iters ({train_iters}): "
            "the run would end before its peak rate"
        )
    if schedule.min_lr > peak_lr:
        raise ConfigError(f"{_WHERE}.min_lr ({schedule.min_lr:g}) must not exceed optimizer.lr ({peak_lr:g})")
    if schedule.type == "constant":
        for name, value in (("decay_iters", decay), ("min_lr", schedule.min_lr or None)):
            if value is not None:
                raise ConfigError(
                    f"{_WHERE}.{name} ({value}) means nothing with {_WHERE}.type constant, which never decays; "
                    "remove it, or choose wsd, cosine or linear"
                )
    if schedule.type in ("cosine", "linear") and decay is not None and decay <= warmup:
        raise ConfigError(
            f"{_WHERE}.decay_iters ({decay}) is the iteration where {schedule.type} reaches min_lr; it must exceed "
            f"{_WHERE}.warmup_iters ({warmup})"
        )
    if schedule.type == "wsd" and decay is not None and warmup + decay > train_iters:
        raise ConfigError(
            f"{_WHERE}.warmup_iters + decay_iters ({warmup} + {decay}) must not exceed "
            f"training.train_iters ({train_iters})"
        )


def _decay_span(schedule: ScheduleConfig, train_iters: int) -> tuple[int, int]:
    """The iterations where decay begins and where `min_lr` is reached."""
    if schedule.type == "wsd":
        room = train_iters - schedule.warmup_iters
        length = schedule.decay_iters or min(max(1, train_iters // 5), room)
        return train_iters - length, train_iters
    return schedule.warmup_iters, schedule.decay_iters or train_iters
