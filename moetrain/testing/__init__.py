"""Tools for tests of this project and of its plug-ins: process groups in a second, commands, what routers promise.

`run_distributed` keeps one server process that has imported torch and Megatron and forks ranks from it, which takes
0.6 s a launch where fresh interpreters take 35 s (4 ranks on 2 cores).
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moetrain.config.routing import RouterConfig

_PRELOAD = [
    "torch",
    "torch.distributed",
    "deepspeed.runtime.zero.stage_1_and_2",
    "moetrain.train.run",
    "moetrain.cli.app",
]


def check_router(settings: RouterConfig, num_experts: int = 8, hidden_size: int = 64, seed: int = 0) -> None:
    """Hold the router of these settings to what `moetrain.moe.routing.Router` promises, on random tokens.

    Needs no process group and no registration, and takes a fraction of a second. `num_experts` must be legal for the
    settings. Raises AssertionError with the promise that is broken.
    """
    from moetrain.testing.routers import check_promises  # with torch, which tests of commands need not load

    check_promises(settings, num_experts, hidden_size, seed)


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 600.0) -> list[Any]:
    """Call `function(*args)` in `world_size` processes joined by gloo; the results, in rank order.

    `function` must be importable (defined at module level) and its results picklable. The tracebacks of failing ranks
    are raised here as one AssertionError; the other ranks are ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    port = _free_port()
    processes, reports = [], {}
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_run_rank, args=(function, args, rank, world_size, port, sender))
        process.start()
        sender.close()  # so that a rank which dies in silence closes the pipe
        processes.append(process)
        reports[receiver] = rank
    try:
        outcomes = _collect(reports, time.monotonic() + timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()
    errors = [f"rank {rank}:\n{text}" for rank, (ok, text) in sorted(outcomes.items()) if not ok]
    if errors or len(outcomes) < world_size:
        missing = sorted(set(range(world_size)) - set(outcomes))
        raise AssertionError("\n".join(errors) or f"ranks {missing} had no result after {timeout:g} s")
    return [outcomes[rank][1] for rank in range(world_size)]


def _collect(reports: dict[Connection, int], deadline: float) -> dict[int, tuple[bool, Any]]:
    """(succeeded, result or traceback) by rank. After a failure the peers get a second to tell of their own."""
    outcomes: dict[int, tuple[bool, Any]] = {}
    waiting = dict(reports)
    while waiting and time.monotonic() < deadline:
        for report in wait(list(waiting), timeout=max(0.0, deadline - time.monotonic())):
            assert isinstance(report, Connection)
            rank = waiting.pop(report)
            try:
                outcomes[rank] = pickle.loads(report.recv_bytes())
            except EOFError:
                outcomes[rank] = (False, "the process died without a report")
            if not outcomes[rank][0]:
                deadline = min(deadline, time.monotonic() + 1.0)
    return outcomes


@dataclass(frozen=True)
class CliResult:
    """How a command ended: its exit code (negative: killed by that signal) and all that it wrote."""

    code: int
    stdout: str
    stderr: str


def run_cli(
    argv: Sequence[str], cwd: Path, environment: Mapping[str, str] | None = None, timeout: float = 240.0
) -> CliResult:
    """`moetrain *argv` in the folder `cwd`, in a process of its own that begins with everything imported.

    `environment` is added to the server's. AssertionError when it takes more than `timeout` seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory(prefix="moetrain-test-") as folder:
        process = context.Process(target=_run_command, args=(list(argv), cwd, dict(environment or {}), Path(folder)))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
        out, err = ((Path(folder) / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
        assert process.exitcode is not None
        assert process.exitcode != -signal.SIGKILL, f"{argv} took more than {timeout:g} s; it said: {out}{err}"
        return CliResult(process.exitcode, out, err)


def _run_command(argv: list[str], cwd: Path, environment: dict[str, str], folder: Path) -> None:
    from moetrain.cli.app import main

    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(environment)
    # What this command starts must find this moetrain from whatever folder it runs in.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    os.chdir(cwd)
    main(argv)


def _run_rank(
    function: Callable[..., Any], args: tuple[Any, ...], rank: int, world_size: int, port: int, report: Connection
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    try:
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            "127.0.0.1", port, world_size, is_master=rank == 0, timeout=timedelta(seconds=120)
        )
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=300))
        result = function(*args)
        dist.barrier()
        outcome = (True, result)
    except BaseException:  # whatever it is, the test wants to see it
        outcome = (False, traceback.format_exc())
    # Plain bytes: torch teaches `Connection.send` to pass tensors by a handle that dies with this process.
    report.send_bytes(pickle.dumps(outcome))
    # Neither destroying the group nor running exit handlers tells a test anything, and both can wait for peers.
    os._exit(0)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
