"""Starts torchrun on this machine, shows rank 0, keeps everything, and reports a failure once and clearly."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, Self, TextIO

from moetrain.errors import ConfigError, MoetrainError
from moetrain.runtime.logs import writing_into
from moetrain.runtime.preemption import LAUNCHED, exit_with_parent, request_stop, stop_file

# Stands before each line that comes from a rank, so that torchrun's own words can be told from theirs. A record
# separator occurs in no text that a person is meant to read.
_RANK_MARK = "\x1e"
_FAILURE = re.compile(r"rank\s+: (\d+) \(local_rank: \d+\)\s+exitcode\s+: (-?\d+)")
_TAIL_LINES = 40


@dataclass(frozen=True)
class LaunchFolder:
    """Where one launch keeps its words: `agent.log` (torchrun's own), `ranks_*/attempt_<n>/<rank>/std{out,err}.log`."""

    path: Path

    @property
    def agent_log(self) -> Path:
        """What torchrun itself said."""
        return self.path / "agent.log"

    def stderr_log(self, rank: int) -> Path | None:
        """The rank's standard error in its last attempt, or None if it never started."""
        found = list(self.path.glob(f"ranks_*/attempt_*/{rank}/stderr.log"))
        return max(found, key=lambda path: int(path.parts[-3].removeprefix("attempt_")), default=None)


def launch_local(
    num_processes: int,
    argv: Sequence[str],
    *,
    run_dir: Path,
    device: str = "auto",
    cpu_threads: int | None = None,
    max_restarts: int = 0,
    stop_grace_seconds: float = 300.0,
    module: str = "moetrain",
    stdout: TextIO | None = None,
    stderr: TextIO | None = None,
) -> int:
    """Runs `python -m <module> <argv>` in `num_processes` ranks under torchrun, in this interpreter; waits; returns
    the exit code for the shell.

    Rank 0's output is passed on to `stdout` and `stderr`; every rank's is kept under `<run_dir>/logs/<UTC time>/`,
    beside torchrun's own in `agent.log`. Call from the main thread.

    Exit code: 0 when every rank left with 0; 2 when a rank left with 2 (a MoetrainError, which that rank has
    explained: nothing is added but the words of a rank other than 0); 128 + signal when it was killed on request;
    else 1, after the last words of the rank that failed and of torchrun.

    The first SIGINT or SIGTERM asks the ranks to save and stop (`<run_dir>/stop-requested`). A second one, or
    `stop_grace_seconds` without an end, goes to torchrun, which gives the ranks 10 s and then kills them.

    `device`, `cpu_threads`: as in the config's `runtime` section. Raises ConfigError on sizes below 1, and where
    `run_dir` cannot be written.
    """
    for name, value, least in (("num_processes", num_processes, 1), ("max_restarts", max_restarts, 0)):
        if value < least:
            raise ConfigError(f"{name} ({value}) must be at least {least}")
    folder = LaunchFolder(run_dir / "logs" / datetime.now(UTC).strftime("%Y%m%dT%H%M%S-%f"))
    with writing_into(run_dir):
        folder.path.mkdir(parents=True)
        stop_file(run_dir).unlink(missing_ok=True)
    out, err = stdout or sys.stdout, stderr or sys.stderr
    agent = subprocess.Popen(
        torchrun_command(num_processes, argv, folder, max_restarts, module),
        env=rank_environment(os.environ, num_processes, device, cpu_threads),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # a terminal's Ctrl-C reaches us alone, and we decide what becomes of it
        preexec_fn=partial(exit_with_parent, signal.SIGTERM),  # safe: no thread of ours runs yet
    )
    with _Stopper(agent, run_dir, stop_grace_seconds, err) as stopper:
        code = _pump(agent, folder, out, err)
    if code == 0:
        return 0
    if stopper.killed_by is not None:
        return 128 + stopper.killed_by
    return _report(_failures(folder), folder, err)


def torchrun_command(
    num_processes: int, argv: Sequence[str], folder: LaunchFolder, max_restarts: int = 0, module: str = "moetrain"
) -> list[str]:
    """torchrun's command line: a private rendezvous on this host, all output to files, local rank 0 shown as well."""
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes=1", f"--nproc-per-node={num_processes}", f"--max-restarts={max_restarts}"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--rdzv-id=ranks"),
        *("--tee=3", "--local-ranks-filter=0", f"--log-dir={folder.path}"),
        # ranks treat SIGTERM as a wish: after a failure torchrun would wait 30 s (default) for those in a collective
        "--shutdown-timeout=10",
        *("-m", module, *argv),
    ]


def rank_environment(
    environment: Mapping[str, str], num_processes: int, device: str, cpu_threads: int | None
) -> dict[str, str]:
    """The ranks' environment. What the user has set stays, except `cpu_threads` from the config, which decides."""
    cores = len(os.sched_getaffinity(0))
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cores // num_processes)),
        # else a restarted rank reads the addresses of the ranks that died (torch 2.13, gloo)
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    if device == "cpu" or (device == "auto" and not _has_nvidia_driver()):
        # fresh pages cost a step on CPU 3-4 times the arithmetic: let malloc keep what it has
        defaults |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30)}
    fixed = {LAUNCHED: "1", "PYTHONUNBUFFERED": "1", "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": _RANK_MARK}
    if cpu_threads is not None:
        fixed["OMP_NUM_THREADS"] = str(cpu_threads)
    return defaults | dict(environment) | fixed


def _has_nvidia_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists()


class _Stopper:
    """Turns our signals into a request to the run, and a repeated or unheard one into torchrun's end."""

    def __init__(self, agent: subprocess.Popen[bytes], run_dir: Path, grace_seconds: float, err: TextIO) -> None:
        self.killed_by: int | None = None
        self._agent, self._run_dir, self._grace, self._err = agent, run_dir, grace_seconds, err
        self._timer: threading.Timer | None = None
        self._previous = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._timer is not None:
            self._timer.cancel()
        stop_file(self._run_dir).unlink(missing_ok=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._timer is not None:
            self._kill(number)
            return
        request_stop(self._run_dir, signal.Signals(number).name)
        self._timer = threading.Timer(self._grace, self._kill, (number,))
        self._timer.daemon = True
        self._timer.start()
        print(
            f"{signal.Signals(number).name}: the run will save and stop at its next step boundary; again to kill it",
            file=self._err,
            flush=True,
        )

    def _kill(self, number: int) -> None:
        self.killed_by = number
        self._agent.send_signal(number)


def _pump(agent: subprocess.Popen[bytes], folder: LaunchFolder, out: TextIO, err: TextIO) -> int:
    """Passes the ranks' lines on and files torchrun's own, until the end. Returns torchrun's exit code."""
    with folder.agent_log.open("a", encoding="utf-8") as log:
        pumps = [
            threading.Thread(target=_split, args=(stream, terminal, log))
            for stream, terminal in ((agent.stdout, out), (agent.stderr, err))
        ]
        for pump in pumps:
            pump.start()
        for pump in pumps:
            pump.join()
        return agent.wait()


def _split(stream: IO[bytes], terminal: TextIO, log: TextIO) -> None:
    for raw in stream:
        line = raw.decode("utf-8", errors="replace")
        target = terminal if line.startswith(_RANK_MARK) else log
        # a rank may flush half a line, which torchrun then marks twice
        target.write(line.replace(_RANK_MARK, ""))
        target.flush()


def _failures(folder: LaunchFolder) -> dict[int, int]:
    """Exit code of each failed rank, the first to fail first, from torchrun's closing report; empty without one."""
    report = folder.agent_log.read_text(encoding="utf-8")
    others, _, root = report.partition("Root Cause")
    return {int(rank): int(code) for rank, code in _FAILURE.findall(root) + _FAILURE.findall(others)}


def _report(failures: Mapping[int, int], folder: LaunchFolder, err: TextIO) -> int:
    """Says what rank 0's own words, which have been shown, have not said. Returns our exit code."""
    refused = [rank for rank, code in failures.items() if code == MoetrainError.exit_code]
    if refused:
        # torchrun may have ended rank 0 between its words and its exit
        if 0 not in refused and _last_line(folder, refused[0]) != _last_line(folder, 0):
            _say_last_words(refused[0], folder, err)
        return MoetrainError.exit_code
    for rank, code in failures.items():
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        print(f"rank {rank} failed: {how}", file=err)
    first = next(iter(failures), None)
    if first is None:
        print(_tail(folder.agent_log), file=err)
    elif first != 0:
        _say_last_words(first, folder, err)
    print(f"the run failed; what every rank and torchrun said: {folder.path}", file=err, flush=True)
    return 1


def _say_last_words(rank: int, folder: LaunchFolder, err: TextIO) -> None:
    log = folder.stderr_log(rank)
    if log is not None:
        print(f"rank {rank} said last:\n{_tail(log)}", file=err, flush=True)


def _last_line(folder: LaunchFolder, rank: int) -> str:
    log = folder.stderr_log(rank)
    return _tail(log).rstrip().rpartition("\n")[2] if log is not None else ""


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:])
