"""launch_local with real torchrun agents and small rank programs (which import no torch, to start at once)."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moetrain.errors import ConfigError
from moetrain.launch.local import launch_local, rank_environment

RANK_PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path

rank = int(os.environ["RANK"])
action, run_dir = sys.argv[1], Path(sys.argv[2])


def wait(condition):
    while not condition():
        time.sleep(0.02)


def report():
    names = ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "MOETRAIN_LAUNCHED")
    print(json.dumps({name: os.environ[name] for name in names}))
    print(f"warning of rank {rank}", file=sys.stderr)


def refuse_on_all():
    print("error: model.num_layers (0) must be at least 1", file=sys.stderr)
    sys.exit(2)


def refuse_on_rank_1():
    if rank == 1:
        print("error: corpus is missing on this node", file=sys.stderr)
        sys.exit(2)
    time.sleep(60)


def crash_on_rank_1():
    print(f"last words of rank {rank}", file=sys.stderr)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def stop_when_asked():
    (run_dir / f"ready-{rank}").touch()
    wait((run_dir / "stop-requested").exists)
    print("saved, because of", (run_dir / "stop-requested").read_text().strip())


def never_stop():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    (run_dir / f"ready-{rank}").touch()
    time.sleep(60)


globals()[action]()
"""


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "rank_program.py").write_text(RANK_PROGRAM)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{Path(__file__).parents[3]}")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    folder = tmp_path / "run with a space"
    folder.mkdir()
    return folder


def launched(action: str, run_dir: Path, **options) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    code = launch_local(
        2, [action, str(run_dir)], run_dir=run_dir, module="rank_program", stdout=out, stderr=err, **options
    )
    return code, out.getvalue(), err.getvalue()


def test_a_clean_run_shows_rank_0_keeps_every_rank_and_ignores_an_old_stop_request(run_dir: Path) -> None:
    (run_dir / "stop-requested").write_text("from last week")
    code, out, err = launched("report", run_dir, cpu_threads=3)
    assert code == 0
    assert not (run_dir / "stop-requested").exists()
    shown = json.loads(out)
    assert shown == {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "3",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "MOETRAIN_LAUNCHED": "1",
    }
    assert err == "warning of rank 0\n"
    logs = run_dir / "logs"
    kept = sorted(json.loads(path.read_text())["RANK"] for path in logs.glob("*/ranks_*/attempt_0/*/stdout.log"))
    assert kept == ["0", "1"]
    assert next(logs.glob("*/ranks_*/attempt_0/1/stderr.log")).read_text() == "warning of rank 1\n"


def test_a_users_error_is_shown_once_without_torchruns_traceback(run_dir: Path) -> None:
    code, out, err = launched("refuse_on_all", run_dir)
    assert (code, out, err) == (2, "", "error: model.num_layers (0) must be at least 1\n")
    assert "ChildFailedError" in next((run_dir / "logs").glob("*/agent.log")).read_text()


def test_a_users_error_of_another_rank_is_shown_too(run_dir: Path) -> None:
    code, _, err = launched("refuse_on_rank_1", run_dir)
    assert code == 2
    assert err == "rank 1 said last:\nerror: corpus is missing on this node\n"


def test_a_crash_names_the_rank_the_signal_and_the_logs(run_dir: Path) -> None:
    code, _, err = launched("crash_on_rank_1", run_dir)
    assert code == 1
    assert "rank 1 failed: killed by SIGKILL" in err
    assert "last words of rank 1" in err
    assert str(run_dir / "logs") in err
    assert "Traceback" not in err


def launcher(action: str, run_dir: Path, grace: float = 300.0) -> subprocess.Popen[str]:
    """A launcher in its own process, with both ranks at work."""
    code = (
        "import sys; from pathlib import Path; from moetrain.launch.local import launch_local; "
        "sys.exit(launch_local(2, sys.argv[1:], run_dir=Path(sys.argv[2]), module='rank_program',"
        f"stop_grace_seconds={grace}))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, action, str(run_dir)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while len(list(run_dir.glob("ready-*"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    return process


def test_sigterm_asks_the_ranks_to_save_and_the_run_ends_well(run_dir: Path) -> None:
    process = launcher("stop_when_asked", run_dir)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out == "saved, because of SIGTERM\n"
    assert "will save and stop" in err
    assert not (run_dir / "stop-requested").exists()


def test_a_second_interrupt_kills_the_ranks(run_dir: Path) -> None:
    process = launcher("never_stop", run_dir)
    process.send_signal(signal.SIGINT)
    while not (run_dir / "stop-requested").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT


def test_a_request_that_no_rank_hears_is_enforced_after_the_grace_time(run_dir: Path) -> None:
    process = launcher("never_stop", run_dir, grace=0.3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize(("processes", "threads"), [(1, 6), (4, 1), (100, 1)])
def test_cores_are_divided_among_the_ranks(processes: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    assert rank_environment({}, processes, "cpu", None)["OMP_NUM_THREADS"] == str(threads)


def test_what_the_user_has_set_stays() -> None:
    mine = {"OMP_NUM_THREADS": "7", "MALLOC_MMAP_MAX_": "9", "HOME": "/somewhere"}
    assert rank_environment(mine, 4, "cpu", None).items() >= mine.items()


def test_only_cpu_runs_get_the_malloc_settings() -> None:
    assert rank_environment({}, 1, "cpu", None)["MALLOC_MMAP_MAX_"] == "0"
    assert "MALLOC_MMAP_MAX_" not in rank_environment({}, 1, "cuda", None)


def test_zero_processes_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"num_processes \(0\) must be at least 1"):
        launch_local(0, ["train"], run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_launching_loads_no_torch() -> None:
    code = (
        "import sys, moetrain.launch.local, moetrain.launch.slurm, moetrain.cli.launch; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=False).returncode == 0
