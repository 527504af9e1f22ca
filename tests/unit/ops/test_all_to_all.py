"""Uneven all-to-all over gloo: four processes, one launch, many checks."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from moetrain import ops

WORLD = 4


def _start_and_wait(x: torch.Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    return ops.start_all_to_all(x, received, sent, group).wait()


BOTH = (ops.all_to_all, _start_and_wait)


def _exchange(
    rows_of: list[list[int]], group: dist.ProcessGroup, dtype: torch.dtype, width: int, all_to_all: Callable
) -> None:
    """``rows_of[s][d]`` rows go from s to d, each filled with its way in numbers; gradients come home."""
    me, size = group.rank(), group.size()
    sent, received = rows_of[me], [rows_of[source][me] for source in range(size)]
    label = torch.tensor([10 * me + d for d in range(size)]).repeat_interleave(torch.tensor(sent))
    x = label[:, None].expand(-1, width).to(dtype)
    if dtype.is_floating_point:
        x.requires_grad_()
    y = all_to_all(x, received, sent, group)
    expected = torch.tensor([10 * s + me for s in range(size)]).repeat_interleave(torch.tensor(received))
    assert torch.equal(y, expected[:, None].expand(-1, width).to(dtype)), (me, y, expected)
    if dtype.is_floating_point:
        y.backward(2 * y.detach())
        assert x.grad is not None
        assert torch.equal(x.grad, 2 * x.detach())


def _check_dtypes_and_splits() -> None:
    world = dist.group.WORLD
    assert world is not None
    uneven = [[1, 0, 3, 2], [0, 0, 0, 0], [5, 1, 0, 0], [2, 2, 2, 2]]
    nothing = [[0] * WORLD] * WORLD
    to_one = [[0, 4, 0, 0]] * WORLD
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        for rows_of in (uneven, nothing, to_one):
            for all_to_all in BOTH:
                _exchange(rows_of, world, dtype, 3, all_to_all)


def _check_subgroup(rank: int) -> None:
    mine = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
    assert isinstance(mine, dist.ProcessGroup)
    for all_to_all in BOTH:
        _exchange([[1, 2], [3, 0]], mine, torch.float32, 5, all_to_all)


def _check_interpreter_lock_is_free_while_waiting(rank: int, all_to_all: Callable) -> None:
    """Rank 0 waits for the others, in the forward and then in the backward; its other thread must go on."""
    world = dist.group.WORLD
    assert world is not None
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.01)

    ones = [1] * WORLD
    x = torch.ones(WORLD, 2, requires_grad=True)
    y = x
    clock = threading.Thread(target=tick)
    if rank == 0:
        clock.start()
    for step in ("forward", "backward"):
        dist.barrier()
        start = time.perf_counter()
        if rank != 0:
            time.sleep(0.5)
        if step == "forward":
            y = all_to_all(x, ones, ones, world)
        else:
            y.sum().backward()
        end = time.perf_counter()
        if rank == 0:
            during = [t for t in ticks if start < t < end]
            assert end - start > 0.3, "rank 0 did not wait: the test shows nothing"
            assert len(during) > 5, f"{step}: the other thread ran {len(during)} times in {end - start:.2f} s"
    done.set()
    if rank == 0:
        clock.join()


def _check_many_iterations(rank: int) -> None:
    """A binding that holds the interpreter lock hangs within some tens of these."""
    world = dist.group.WORLD
    assert world is not None
    generator = torch.Generator().manual_seed(0)  # the same splits on every rank
    for step in range(200):
        rows_of = torch.randint(0, 6, (WORLD, WORLD), generator=generator).tolist()
        dtype = (torch.float32, torch.bfloat16, torch.int64)[step % 3]
        _exchange(rows_of, world, dtype, 1 + step % 5, BOTH[step % 2])


def _check_rows_travel_while_others_are_sent_and_computed(rank: int) -> None:
    """Four exchanges in flight at once, waited for in another order than they left; gradients travel likewise."""
    world = dist.group.WORLD
    assert world is not None
    ones = [1] * WORLD
    xs = [torch.full((WORLD, 3), float(10 * rank + i), requires_grad=True) for i in range(4)]
    pending = [ops.start_all_to_all(x, ones, ones, world) for x in xs]
    ys = [pending[i].wait() * (i + 1) for i in (2, 0, 3, 1)]
    for y, i in zip(ys, (2, 0, 3, 1), strict=True):
        assert torch.equal(y, (10.0 * torch.arange(WORLD)[:, None] + i).expand(-1, 3) * (i + 1))
    torch.stack(ys).sum().backward()
    for i, x in enumerate(xs):
        assert x.grad is not None
        assert torch.equal(x.grad, torch.full((WORLD, 3), i + 1.0))
    with pytest.raises(AssertionError, match="handed out before"):
        pending[0].wait()


def _check_rows_come_to_the_given_place(rank: int) -> None:
    world = dist.group.WORLD
    assert world is not None
    home = torch.zeros(3 * WORLD, 2)
    place = home[WORLD : 2 * WORLD]
    rows = torch.full((WORLD, 2), rank + 1.0)
    arrived = ops.start_all_to_all(rows, [1] * WORLD, [1] * WORLD, world, place).wait()
    assert arrived.data_ptr() == place.data_ptr()
    expected = torch.zeros(3, WORLD, 2)
    expected[1] = torch.arange(1.0, WORLD + 1)[:, None]
    assert torch.equal(home, expected.view(-1, 2))


def _check_errors(rank: int) -> None:
    world = dist.group.WORLD
    assert world is not None
    x = torch.ones(4, 2)
    for all_to_all in (ops.all_to_all, ops.start_all_to_all):
        with pytest.raises(ValueError, match="input_splits has 3 entries, the group has 4 ranks"):
            all_to_all(x, [1] * 4, [1] * 3, world)
        with pytest.raises(ValueError, match="input_splits sum to 5, x has 4 rows"):
            all_to_all(x, [1] * 4, [1, 1, 1, 2], world)
        with pytest.raises(ValueError, match="must not be negative"):
            all_to_all(x, [-1, 1, 2, 2], [1] * 4, world)
    dist.barrier()


def _worker(rank: int, store_path: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store_path}", rank=rank, world_size=WORLD)
    world = dist.group.WORLD
    assert world is not None
    try:
        _check_dtypes_and_splits()
        _check_subgroup(rank)
        _check_errors(rank)
        for all_to_all in BOTH:
            _check_interpreter_lock_is_free_while_waiting(rank, all_to_all)
        _check_rows_travel_while_others_are_sent_and_computed(rank)
        _check_rows_come_to_the_given_place(rank)
        _check_many_iterations(rank)
        torch.library.opcheck(
            torch.ops.moetrain.all_to_all.default,
            (torch.ones(WORLD, 2, requires_grad=True), [1] * WORLD, [1] * WORLD, world.group_name),
            test_utils=("test_schema", "test_faketensor"),
        )
    finally:
        dist.destroy_process_group()


def test_all_to_all_on_four_ranks(tmp_path):
    spawn(_worker, args=(str(tmp_path / "store"),), nprocs=WORLD)


@pytest.fixture
def group_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_a_group_of_one_returns_its_rows_without_communication(group_of_one):
    x = torch.randn(3, 2)
    assert ops.all_to_all(x, [3], [3], group_of_one) is x
    assert ops.start_all_to_all(x, [3], [3], group_of_one).wait().data_ptr() == x.data_ptr()
    for all_to_all in (ops.all_to_all, ops.start_all_to_all):
        with pytest.raises(ValueError, match=r"must both be \[3\]"):
            all_to_all(x, [2], [3], group_of_one)


def test_a_started_exchange_in_a_group_of_one_has_the_gradient_of_a_copy(group_of_one):
    x = torch.randn(3, 2, requires_grad=True)
    y = ops.start_all_to_all(x, [3], [3], group_of_one).wait()
    (2 * y).sum().backward()
    assert torch.equal(x.grad, torch.full((3, 2), 2.0))


def test_operator_obeys_the_rules_of_the_dispatcher(group_of_one):
    x = torch.randn(3, 2, requires_grad=True)
    torch.library.opcheck(torch.ops.moetrain.all_to_all.default, (x, [3], [3], group_of_one.group_name))
