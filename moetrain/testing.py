"""Tools for tests of this project and of its plug-ins: real process groups in a second, the layouts to try, a tiny run.

`run_distributed` keeps one server process that has imported torch and Megatron and forks ranks from it, which takes
0.6 s a launch where fresh interpreters take 35 s (4 ranks on 2 cores).
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

_PRELOAD = [
    "torch",
    "torch.distributed",
    "deepspeed.runtime.zero.stage_1_and_2",
    "moetrain.train.setup",
]


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300.0) -> list[Any]:
    """Call `function(*args)` in `world_size` processes joined by gloo; the results, in rank order.

    `function` must be importable (defined at module level) and its results picklable. The first failing rank's
    traceback is raised here as an AssertionError; the other ranks are ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory(prefix="moetrain-test-") as folder:
        port = _free_port()
        processes = [
            context.Process(target=_run_rank, args=(function, args, rank, world_size, port, folder))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        _join(processes, Path(folder), time.monotonic() + timeout)
        return [pickle.loads((Path(folder) / f"result-{rank}").read_bytes()) for rank in range(world_size)]


def _run_rank(
    function: Callable[..., Any], args: tuple[Any, ...], rank: int, world_size: int, port: int, folder: str
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    try:
        store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0, timeout=timedelta(seconds=60))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=120))
        result = function(*args)
        dist.barrier()
        (Path(folder) / f"result-{rank}").write_bytes(pickle.dumps(result))
    except BaseException:
        (Path(folder) / f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)
    # Neither destroying the group nor running exit handlers tells a test anything, and both can wait for peers.
    os._exit(0)


def _join(processes: list[ForkServerProcess], folder: Path, deadline: float) -> None:
    try:
        while any(p.is_alive() for p in processes):
            failed = [r for r, p in enumerate(processes) if p.exitcode not in (None, 0)]
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.02)
    finally:
        for process in processes:
            if process.is_alive() and any(p.exitcode not in (None, 0) for p in processes):
                process.join(0.5)  # let it write its own error
            if process.is_alive() and (time.monotonic() > deadline or any(p.exitcode for p in processes)):
                process.kill()
            process.join()
    failed = [r for r, p in enumerate(processes) if p.exitcode != 0]
    if failed:
        reports = [
            f"rank {rank}:\n{(folder / f'error-{rank}').read_text()}"
            if (folder / f"error-{rank}").exists()
            else f"rank {rank}: exit code {processes[rank].exitcode}, no report"
            for rank in failed
        ]
        raise AssertionError("\n".join(reports))


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
