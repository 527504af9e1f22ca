"""What the allocator was asked for, from torch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._C._profiler import _EventType, _ProfilerEvent


def peak_scratch(work: Callable[[], Any]) -> int:
    """The most bytes that were allocated at one time while `work` ran and were free when it had returned.

    So what it returns or leaves behind (outputs, gradients) does not count. CPU tensors only. The profiler does not see
    what gloo's threads give back; such memory counts until its address is taken again, or as left behind.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = sorted(_allocations(profiler.profiler.kineto_results.experimental_event_tree()))
    del result
    alive: dict[int, int] = {}  # address -> index of the event that took it
    for index, (_, size, address) in enumerate(events):
        if size > 0:
            alive[address] = index
        else:
            alive.pop(address, None)
    left_behind = set(alive.values())
    taken: dict[int, int] = {}
    now = peak = 0
    for index, (_, size, address) in enumerate(events):
        if size > 0 and index not in left_behind:
            now += size - taken.get(address, 0)
            taken[address] = size
            peak = max(peak, now)
        elif size < 0:
            now -= taken.pop(address, 0)
    return peak


def _allocations(events: list[_ProfilerEvent]) -> Iterator[tuple[int, int, int]]:
    """(time, bytes, address), bytes negative where memory is given back."""
    for event in events:
        if event.tag == _EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.alloc_size, event.extra_fields.ptr
        yield from _allocations(event.children)
