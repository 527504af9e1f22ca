"""The batch script: its words, its quoting, and its conduct under bash with stand-ins for Slurm's two commands."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from moetrain.errors import ConfigError, DependencyError
from moetrain.launch.slurm import SlurmJob, render_sbatch, submit


def job(run_dir: Path = Path("/shared/runs/a"), **changes) -> SlurmJob:
    return SlurmJob(**({"run_dir": run_dir, "nodes": 2, "processes_per_node": 8, "gpus_per_node": 8} | changes))


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def shell(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", *options], input=script, capture_output=True, text=True, check=False)


FULL = {
    "cpus_per_node": 64,
    "memory": "512G",
    "time_limit": "1-00:00:00",
    "partition": "gpu",
    "account": "lab",
    "qos": "high",
    "constraint": "a100|h100",
    "reservation": "friday",
    "sbatch_options": ("--exclusive", "--exclude=node[1-3]"),
    "env_file": Path("/shared/it's mine.sh"),
    "max_restarts": 2,
}


@pytest.mark.parametrize("changes", [{}, FULL], ids=["least", "full"])
def test_the_script_is_valid_bash_and_clean_for_shellcheck(changes: dict) -> None:
    script = render_sbatch(job(**changes), ["train", "a.yaml", "run.name=it's; rm -rf $HOME"])
    checked = shell(script, "-n")
    assert (checked.returncode, checked.stderr) == (0, "")
    if shutil.which("shellcheck"):
        # SC1091: the cluster's file is elsewhere; SC2317: a trap's function looks unreachable to it; SC2016: arguments
        # are meant not to expand
        command = ["shellcheck", "--exclude=SC1091,SC2317,SC2016", "-"]
        assert subprocess.run(command, input=script, capture_output=True, text=True, check=False).stdout == ""


def test_every_request_reaches_slurm_and_the_signal_goes_to_the_batch_shell_alone() -> None:
    lines = directives(render_sbatch(job(**FULL), ["train", "a.yaml"]))
    assert lines == [
        "--job-name=moetrain",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=8",
        "--cpus-per-task=64",
        "--mem=512G",
        "--time=1-00:00:00",
        "--partition=gpu",
        "--account=lab",
        "--qos=high",
        "--constraint=a100|h100",
        "--reservation=friday",
        "--signal=B:USR1@300",
        "--requeue",
        "--open-mode=append",
        "--output=/shared/runs/a/slurm-%j.out",
        "--exclusive",
        "--exclude=node[1-3]",
    ]


def test_directives_stand_before_the_first_command_or_slurm_would_not_read_them() -> None:
    lines = render_sbatch(job(), ["train"]).splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(not line.startswith("#SBATCH") for line in lines[first_command:])
    assert lines[0] == "#!/bin/bash"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("name", "a b"),
        ("name", "a\n#SBATCH --uid=0"),
        ("name", "x\n"),
        ("partition", "gpu;id"),
        ("account", "$(id)"),
        ("constraint", "a100 h100"),
        ("memory", "lots"),
        ("time_limit", "tomorrow"),
        ("module", "os; id"),
        ("sbatch_options", ("--comment=a b",)),
        ("sbatch_options", ("--comment=$(id)",)),
        ("sbatch_options", ("--wrap=x\nrm",)),
        ("sbatch_options", ("exclusive",)),
        ("run_dir", Path("/runs/a b")),
        ("run_dir", Path("/runs/%u")),
        ("run_dir", Path("/runs/a\nb")),
        ("run_dir", Path("runs/a")),
        ("env_file", Path("env.sh")),
        ("nodes", 0),
        ("processes_per_node", 0),
        ("signal_seconds", 5),
        ("cpus_per_node", 4),
    ],
)
def test_a_value_that_the_script_cannot_carry_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match="sbatch option" if name == "sbatch_options" else rf"slurm {name}|run\.dir"):
        job(**{name: value})


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "a\x1b[2Kb", "a\x00b"])
def test_control_characters_in_an_argument_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="control character"):
        render_sbatch(job(), ["train", text])


def test_an_own_template_is_used_and_a_broken_one_is_named(tmp_path: Path) -> None:
    own = tmp_path / "own.j2"
    own.write_text("{{ job.world_size }} {{ arguments[0] | quote }}\n")
    assert render_sbatch(job(), ["a b"], own) == "16 'a b'\n"
    own.write_text("{{ job.no_such_thing }}")
    with pytest.raises(ConfigError, match=r"own\.j2: UndefinedError"):
        render_sbatch(job(), ["a"], own)


# --- the script's conduct ---------------------------------------------------------------------------------------------

NASTY = ["run.name=it's", 'a"b', "$(touch injected)", "`touch injected`", "; touch injected", "*", "a b", "-n", ""]


class Cluster:
    """A folder that stands in for Slurm: `srun` runs its command here, as node 0; `scontrol` notes what it is asked.

    `python` notes torchrun's arguments, one a line, then does what the test wants of the ranks.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.run_dir = root / "run"
        self.bin = root / "bin"
        self.bin.mkdir(parents=True)
        self.command("srun", 'while [ "${1#--}" != "$1" ]; do shift; done; SLURM_NODEID=0 exec "$@"')
        self.command("scontrol", f'if [ "$1" = show ]; then echo node7; echo node8; else echo "$*" >> {root}/asked; fi')
        self.command("sleep", "exit 0")

    def command(self, name: str, body: str) -> Path:
        path = self.bin / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
        return path

    def start(self, ranks: str, argv: list[str] | None = None, **changes) -> subprocess.Popen[str]:
        python = self.command("python", f'printf "%s\\n" "$PET_LOG_DIR" "$@" > {self.root}/given\n{ranks}')
        options = {"work_dir": self.root, "python": str(python), "env_file": None} | changes
        script = self.root / "script"
        script.write_text(render_sbatch(job(self.run_dir, **options), argv or ["train"]))
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "12345",
            "SLURM_NNODES": "2",
            "SLURM_JOB_NODELIST": "node[7-8]",
        }
        return subprocess.Popen(["bash", str(script)], env=environment, stdout=subprocess.PIPE, text=True)

    def given(self) -> list[str]:
        return (self.root / "given").read_text().splitlines()

    def asked(self) -> str:
        path = self.root / "asked"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_torchrun_gets_every_argument_as_it_was_given(cluster: Cluster) -> None:
    process = cluster.start("exit 0", ["train", *NASTY], max_restarts=3)
    process.communicate(timeout=20)
    assert process.returncode == 0
    log_dir, *arguments = cluster.given()
    assert log_dir == f"{cluster.run_dir}/logs/slurm-12345-0/node-0"
    assert arguments == [
        *("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=8", "--max-restarts=3"),
        *("--rdzv-id=12345-0", "--rdzv-backend=c10d", "--rdzv-endpoint=node7:22345"),
        *("--tee=3", "--local-ranks-filter=0", "-m", "moetrain", "train", *NASTY),
    ]
    assert not (cluster.root / "injected").exists()


@pytest.mark.parametrize("status", [0, 1, 7])
def test_the_jobs_exit_code_is_the_steps_and_an_ended_run_is_not_requeued(cluster: Cluster, status: int) -> None:
    process = cluster.start(f"exit {status}")
    process.communicate(timeout=20)
    assert process.returncode == status
    assert cluster.asked() == ""


def test_near_the_time_limit_the_ranks_save_and_the_job_is_requeued(cluster: Cluster) -> None:
    stop = cluster.run_dir / "stop-requested"
    ranks = f"touch {cluster.root}/ready; until [ -e {stop} ]; do /bin/sleep 0.02; done; cp {stop} {cluster.root}/saved"
    process = cluster.start(ranks)
    until((cluster.root / "ready").exists)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=20)
    assert "time limit" in (cluster.root / "saved").read_text()
    assert cluster.asked() == "requeue 12345\n"
    assert not stop.exists(), "the requeued run would stop at once"
    assert "the ranks left with status 0" in out


def test_a_run_that_fails_while_it_stops_is_not_requeued(cluster: Cluster) -> None:
    stop = cluster.run_dir / "stop-requested"
    process = cluster.start(f"touch {cluster.root}/ready; until [ -e {stop} ]; do /bin/sleep 0.02; done; exit 3")
    until((cluster.root / "ready").exists)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=20)
    assert process.returncode == 3
    assert cluster.asked() == ""


def test_scancel_does_not_end_the_batch_shell_before_the_ranks(cluster: Cluster) -> None:
    process = cluster.start(f"touch {cluster.root}/ready; /bin/sleep 0.5; touch {cluster.root}/left; exit 4")
    until((cluster.root / "ready").exists)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert (cluster.root / "left").exists()
    assert process.returncode == 4
    assert cluster.asked() == ""


def test_a_stop_request_of_the_last_run_is_removed_before_the_ranks_start(cluster: Cluster) -> None:
    cluster.run_dir.mkdir()
    (cluster.run_dir / "stop-requested").write_text("old")
    process = cluster.start(f"[ ! -e {cluster.run_dir}/stop-requested ] && [ $MOETRAIN_LAUNCHED = 1 ]")
    process.communicate(timeout=20)
    assert process.returncode == 0


def test_the_clusters_file_is_sourced_first_and_may_read_unset_variables(cluster: Cluster) -> None:
    environment = cluster.root / "it's env.sh"
    environment.write_text('export FABRIC="ib$UNSET_ON_THIS_MACHINE"\n')
    process = cluster.start(
        f'echo "$FABRIC $OMP_NUM_THREADS" > {cluster.root}/seen', env_file=environment, cpus_per_node=32
    )
    process.communicate(timeout=20)
    assert process.returncode == 0
    assert (cluster.root / "seen").read_text() == "ib 4\n"


@pytest.mark.parametrize("limit", ["5", "5:00", "0:05:00", "0-0:05", "0-00:04:59"])
def test_a_signal_that_would_come_at_the_start_is_refused(limit: str) -> None:
    with pytest.raises(ConfigError, match=r"signal_seconds \(300\) must be below time_limit"):
        job(time_limit=limit)


@pytest.mark.parametrize("limit", ["0", "6", "5:01", "0:05:01", "1-0", "0-1"])
def test_a_signal_within_the_time_limit_is_legal(limit: str) -> None:
    assert f"--time={limit}" in job(time_limit=limit).directives


# --- submission ------------------------------------------------------------------------------------------------------


def with_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(f"#!/bin/bash\n{body}\n")
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_submit_keeps_the_script_and_returns_slurms_job_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_sbatch(tmp_path, monkeypatch, f'cp "$2" {tmp_path}/seen; echo "4711;cluster"')
    assert submit("#!/bin/bash\n", tmp_path / "run") == "4711"
    kept = list((tmp_path / "run").glob("submit-*.sbatch"))
    assert [path.read_text() for path in kept] == ["#!/bin/bash\n"] == [(tmp_path / "seen").read_text()]


def test_slurms_refusal_is_a_config_error_in_slurms_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_sbatch(tmp_path, monkeypatch, "echo 'invalid partition specified: gpu' >&2; exit 1")
    with pytest.raises(ConfigError, match="invalid partition specified: gpu"):
        submit("#!/bin/bash\n", tmp_path / "run")


def test_without_sbatch_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DependencyError, match="sbatch is not on PATH"):
        submit("#!/bin/bash\n", tmp_path / "run")
    assert not (tmp_path / "run").exists()
