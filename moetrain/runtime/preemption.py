"""How a run is asked to stop: a file in the run folder, or a signal to a rank. No torch, no collective.

A request is local knowledge of one rank; the trainer combines the ranks' answers at a step boundary, so that all of
them leave at the same step. The file is the way that launchers use, because a signal does not travel well: torchrun
dies of SIGUSR1 and leaves its ranks orphaned, and kills them a fixed time after SIGTERM.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

STOP_FILE = "stop-requested"
LAUNCHED = "MOETRAIN_LAUNCHED"
"""Set to 1 by launchers in the ranks' environment: they have removed an old request before the ranks began."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_PR_SET_PDEATHSIG = 1


def stop_file(run_dir: Path) -> Path:
    """The file whose presence asks the run in `run_dir` to stop at its next step boundary."""
    return run_dir / STOP_FILE


def request_stop(run_dir: Path, reason: str) -> None:
    """Asks the run in `run_dir` to save and stop. The file appears whole: a poller never reads half a reason."""
    path = stop_file(run_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f".{path.name}.{os.getpid()}")
    whole.write_text(reason + "\n", encoding="utf-8")
    whole.replace(path)


def forget_old_request(run_dir: Path) -> None:
    """Removes a request that an earlier process of this run has obeyed, or never saw. One rank only, as its first act.

    A launcher did so long before this process had imported anything. What it finds under one was asked since, perhaps
    of ranks that have crashed and were started again, and stays.
    """
    if os.environ.get(LAUNCHED) != "1":
        stop_file(run_dir).unlink(missing_ok=True)


class StopRequest:
    """Whether this rank has been asked to stop, and why.

    `install()` turns SIGTERM, SIGUSR1 and the first SIGINT into a request; a second SIGINT does what it did before
    (KeyboardInterrupt), so an impatient user is never locked out. `poll_file` may be false on all ranks but one, to
    spare a shared file system a look-up per rank and step.
    """

    def __init__(self, run_dir: Path, poll_file: bool = True) -> None:
        self._path = stop_file(run_dir)
        self._poll_file = poll_file
        self._signal: str | None = None
        self._previous: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def install(self) -> None:
        """Takes over the signals. Main thread only (Python's rule)."""
        assert not self._previous, "installed twice"
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)

    def uninstall(self) -> None:
        """Gives the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous = {}

    def clear(self) -> None:
        """Removes a request file that has been obeyed."""
        self._path.unlink(missing_ok=True)

    @property
    def requested(self) -> str | None:
        """Why this rank should stop, or None. One look at the file where it polls; no communication."""
        if self._signal is not None:
            return self._signal
        if not self._poll_file:
            return None
        try:
            return self._path.read_text(encoding="utf-8", errors="replace").strip() or f"{STOP_FILE} file"
        except FileNotFoundError:
            return None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal is not None:
            previous = self._previous.get(number)
            if callable(previous):
                previous(number, frame)
                return
        self._signal = signal.Signals(number).name


def exit_with_parent(number: int = signal.SIGKILL) -> None:
    """Has the kernel send `number` to this process when its parent dies (Linux; elsewhere nothing).

    Without it, ranks whose torchrun agent was killed go on as orphans and hold their GPUs.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
