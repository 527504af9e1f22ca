from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from moetrain.runtime.preemption import LAUNCHED, StopRequest, forget_old_request, request_stop, stop_file


@pytest.fixture
def stop(tmp_path: Path) -> Iterator[StopRequest]:
    # A shell ignores interrupts in what it starts in the background, and a process inherits that.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    request = StopRequest(tmp_path)
    request.install()
    yield request
    request.uninstall()
    assert before == {number: signal.getsignal(number) for number in before}
    signal.signal(signal.SIGINT, inherited)


def test_nothing_is_requested_at_first(stop: StopRequest) -> None:
    assert stop.requested is None


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_is_a_request_and_its_name_the_reason(stop: StopRequest, name: str) -> None:
    os.kill(os.getpid(), signal.Signals[name])
    assert stop.requested == name


def test_a_second_interrupt_interrupts(stop: StopRequest) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_the_file_is_a_request_its_text_the_reason_and_clear_obeys_it(stop: StopRequest, tmp_path: Path) -> None:
    request_stop(tmp_path, "maintenance at noon")
    assert stop.requested == "maintenance at noon"
    assert [path.name for path in tmp_path.iterdir()] == ["stop-requested"]
    stop.clear()
    assert stop.requested is None
    stop.clear()


@pytest.mark.parametrize(("launched", "stays"), [("1", True), (None, False)])
def test_a_request_that_a_launcher_left_standing_is_of_this_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launched: str | None, stays: bool
) -> None:
    monkeypatch.delenv(LAUNCHED, raising=False)
    if launched is not None:
        monkeypatch.setenv(LAUNCHED, launched)
    request_stop(tmp_path, "before the ranks had imported anything")
    forget_old_request(tmp_path)
    assert stop_file(tmp_path).exists() == stays


def test_an_empty_file_is_a_request_too(stop: StopRequest, tmp_path: Path) -> None:
    (tmp_path / "stop-requested").touch()
    assert stop.requested == "stop-requested file"


def test_a_rank_that_does_not_poll_sees_signals_only(tmp_path: Path) -> None:
    request_stop(tmp_path, "now")
    request = StopRequest(tmp_path, poll_file=False)
    assert request.requested is None
    request.install()
    os.kill(os.getpid(), signal.SIGUSR1)
    request.uninstall()
    assert request.requested == "SIGUSR1"


def test_a_child_does_not_outlive_its_killed_parent() -> None:
    child = (
        "import time; from moetrain.runtime.preemption import exit_with_parent\n"
        "exit_with_parent(); print('up', flush=True); time.sleep(60)"
    )
    parent = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline(); print(child.pid, flush=True); child.wait()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while _runs(pid):
        assert time.monotonic() < deadline, "the orphan lives"
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False
