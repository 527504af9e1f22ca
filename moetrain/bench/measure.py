"""Times of contenders, taken in turns: A B A B. Whatever slows the machine for a while then slows both.

On one CPU thread: that thread's CPU time, so that other processes hardly count. On several: wall time. On CUDA: events.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from moetrain.bench.agreement import check_agreement
from moetrain.bench.problem import Contender, Missing, Problem
from moetrain.bench.results import CaseResult, Point

# A clock takes a call and gives its result and seconds.
Clock = Callable[[Callable[[], Any]], tuple[Any, float]]

MIN_ROUNDS, MAX_ROUNDS = 3, 25
FAR_SLOWER = 10.0  # a baseline that takes this many times our time, and long, takes part in the first rounds only
_LONG = 0.1
_SHORTEST = 2e-3  # a shorter call is repeated until it takes as long: clocks and caches are too coarse for it


def clock_for(device: str, threads: int) -> Clock:
    """See the module's docstring."""
    if device == "cuda":
        return _by_events
    now = time.thread_time if threads == 1 else time.perf_counter

    def clock(call: Callable[[], Any]) -> tuple[Any, float]:
        start = now()
        result = call()
        return result, now() - start

    return clock


def _by_events(call: Callable[[], Any]) -> tuple[Any, float]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    result = call()
    end.record()
    end.synchronize()
    return result, start.elapsed_time(end) / 1e3


def measure(name: str, point: Point, threads: int, problem: Problem, clock: Clock, budget: float) -> CaseResult:
    """Check that all agree, then time them for about `budget` seconds, and at least three rounds.

    Raises:
        DisagreementError: a baseline's result is not ours.
    """
    case = f"{name} {point.label()}"
    first, missing = _first_calls(case, point.dtype, problem, clock)
    calls = {who: c.call for who, c in {"": problem.ours, **problem.baselines}.items() if isinstance(c, Contender)}
    times = alternate({who: calls[who] for who in first}, first, clock, budget)
    ours = times.pop("")
    return CaseResult(name, point, threads, ours, times, missing, work=problem.work, unit=problem.unit)


def _first_calls(case: str, dtype: str, problem: Problem, clock: Clock) -> tuple[dict[str, float], dict[str, str]]:
    """Warm all up and compare them: seconds of each first call (ours under ""), and why a baseline is missing."""
    output, seconds = _first_call(problem.ours, clock)
    ours, first = problem.ours.result(output), {"": seconds}
    missing = {}
    for who, baseline in problem.baselines.items():
        if isinstance(baseline, Missing):
            missing[who] = baseline.reason
            continue
        try:
            output, seconds = _first_call(baseline, clock)
        except Exception as error:  # whatever a library cannot do here: the table says so, in its own words
            missing[who] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            continue
        check_agreement(case, who, dtype, ours, baseline.result(output))
        first[who] = seconds
        output = None  # before the next one allocates its own
    return first, missing


def _first_call(contender: Contender, clock: Clock) -> tuple[Any, float]:
    """Result, and about how long a call takes. A short one is called twice: the first mostly warms up."""
    output, seconds = clock(contender.call)
    return output, seconds if seconds > _LONG else min(seconds, clock(contender.call)[1])


def alternate(
    calls: Mapping[str, Callable[[], Any]], first: Mapping[str, float], clock: Clock, budget: float
) -> dict[str, list[float]]:
    """Seconds a call, one entry a round: in each round all are called in the order given. Ours is named "".

    `first`: what a call of each is known to take, roughly. One that is far slower than ours is in the
    first `MIN_ROUNDS` only.
    """
    times: dict[str, list[float]] = {who: [] for who in calls}
    repeats = {who: max(1, math.ceil(_SHORTEST / max(first[who], 1e-7))) for who in calls}
    slow = {who for who in calls if first[who] > max(FAR_SLOWER * first[""], _LONG)}
    end = time.perf_counter() + budget
    for number in range(MAX_ROUNDS):
        if number >= MIN_ROUNDS and time.perf_counter() > end:
            break
        for who, call in calls.items():
            if number < MIN_ROUNDS or who not in slow:
                _, seconds = clock(partial(_repeat, call, repeats[who]))
                times[who].append(seconds / repeats[who])
    return times


def _repeat(call: Callable[[], Any], times: int) -> Any:
    for _ in range(times - 1):
        call()
    return call()  # whoever timed it lets go of the result: freeing is no part of a call
