"""Learning-rate schedules: pure functions of the iteration, so a resumed run needs no scheduler state.

Iterations are 0-based: `iteration` is the number of steps already done when the step begins. Warm-up counts the step
itself, so no step is ever taken at a rate of zero; decay reaches `min_lr` after its last step, so a run that decays to
zero does not waste that step either. The shapes are those of Megatron-LM's `OptimizerParamScheduler`.
"""

from __future__ import annotations

import math

from moetrain.config.schema import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, peak_lr: float, train_iters: int, iteration: int) -> float:
    """The rate of the step that begins after `iteration` steps.

    Linear warm-up to `peak_lr` over `warmup_iters` (the first step uses `peak_lr / warmup_iters`), then:

    - `constant`: `peak_lr` for ever;
    - `linear`, `cosine`: down to `min_lr` at `decay_iters` (default `train_iters`), and `min_lr` from there on;
    - `wsd`: `peak_lr`, then linearly down to `min_lr` over the last `decay_iters` iterations (default a fifth of
      `train_iters`, or what warm-up leaves of them).

    The config's own validation has made sure that the schedule fits `peak_lr` and `train_iters`.
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


def _decay_span(schedule: ScheduleConfig, train_iters: int) -> tuple[int, int]:
    """The iterations where decay begins and where `min_lr` is reached."""
    if schedule.type == "wsd":
        room = train_iters - schedule.warmup_iters
        length = schedule.decay_iters or min(max(1, train_iters // 5), room)
        return train_iters - length, train_iters
    return schedule.warmup_iters, schedule.decay_iters or train_iters
