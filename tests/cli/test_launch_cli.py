from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import moetrain.launch.local
from moetrain.cli.launch import app
from moetrain.errors import ConfigError, DependencyError, LayoutError

CONFIG = {
    "run": {"dir": "runs/small", "name": "small"},
    "model": {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "ffn_hidden_size": 32,
        "vocab_size": 64,
        "seq_length": 8,
    },
    "data": {"tokenizer": {"path": "tokenizer.model"}, "train": [{"path": "corpus"}]},
    "training": {"train_iters": 10, "global_batch_size": 4},
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def invoke(*words: str):
    """The command's outcome; an error of ours is raised, as the program's entry point would see it."""
    result = CliRunner().invoke(app, list(words))
    if isinstance(result.exception, Exception):
        raise result.exception
    return result


SLURM = ("slurm", "--nodes", "2", "--gpus-per-node", "2")


def test_a_dry_run_prints_a_script_that_bash_accepts_and_writes_nothing(folder: Path) -> None:
    result = invoke(*SLURM, "--dry-run", "--name", "small", "config.yaml", "run.name=it's")
    assert result.exit_code == 0
    assert subprocess.run(["bash", "-n"], input=result.stdout, text=True, check=False).returncode == 0
    lines = result.stdout.splitlines()
    assert f"#SBATCH --output={folder}/runs/small/slurm-%j.out" in lines
    assert lines[lines.index("  -m moetrain") + 1 :][:4] == [
        "  train",
        "  config.yaml",
        """  'run.name=it'"'"'s'""",
        ")",
    ]
    assert [entry.name for entry in folder.iterdir()] == ["config.yaml"]


def test_printing_is_the_default() -> None:
    assert invoke(*SLURM, "config.yaml").stdout.startswith("#!/bin/bash\n")


def test_the_jobs_name_is_the_runs_unless_given() -> None:
    assert "#SBATCH --job-name=small\n" in invoke(*SLURM, "config.yaml").stdout
    assert "#SBATCH --job-name=other\n" in invoke(*SLURM, "--name", "other", "config.yaml").stdout


def test_submitting_without_slurm_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(DependencyError, match="sbatch is not on PATH"):
        invoke(*SLURM, "--submit", "config.yaml")


def test_submitting_prints_the_job_id(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    sbatch = folder / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/bash\necho 4711\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:/usr/bin:/bin")
    assert invoke(*SLURM, "--submit", "config.yaml").stdout == "4711\n"
    assert len(list((folder / "runs" / "small").glob("submit-*.sbatch"))) == 1


@pytest.mark.parametrize("command", [SLURM, ("local", "-n", "4")], ids=["slurm", "local"])
@pytest.mark.parametrize(
    ("override", "error", "names"),
    [
        ("model.num_layer=2", ConfigError, "num_layer"),
        ("parallel.tensor=3", ConfigError, "tensor"),
        ("training.global_batch_size=6", LayoutError, "global_batch_size"),
        ("optimizer.schedule.warmup_iters=11", ConfigError, "warmup_iters"),
    ],
)
def test_a_wrong_config_is_refused_before_anything_starts(
    command: tuple[str, ...], override: str, error: type[Exception], names: str, folder: Path
) -> None:
    with pytest.raises(error, match=names):
        invoke(*command, "config.yaml", override)
    assert [entry.name for entry in folder.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("slurm", "--nodes", "2", "config.yaml"), "--gpus-per-node"),
        ((*SLURM, "--env-file", "none.sh", "config.yaml"), r"none\.sh is not a file"),
        ((*SLURM, "--sbatch=--wrap=a b", "config.yaml"), "sbatch option"),
        ((*SLURM, "run.name=x"), "no configuration file"),
        (("local", "run.name=x"), "no configuration file"),
    ],
)
def test_a_wrong_command_line_is_one_config_error(words: tuple[str, ...], names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        invoke(*words)


def test_local_hands_the_arguments_on_and_returns_the_ranks_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def record(num_processes: int, argv: list[str], **options) -> int:
        seen.update(options, num_processes=num_processes, argv=argv)
        return 7

    monkeypatch.setattr(moetrain.launch.local, "launch_local", record)
    result = invoke("local", "-n", "2", "config.yaml", "runtime.device=cpu", "runtime.cpu_threads=1")
    assert result.exit_code == 7
    assert seen == {
        "num_processes": 2,
        "argv": ["train", "config.yaml", "runtime.device=cpu", "runtime.cpu_threads=1"],
        "run_dir": Path("runs/small"),
        "device": "cpu",
        "cpu_threads": 1,
        "max_restarts": 0,
    }


@pytest.mark.parametrize("command", ["local", "slurm"])
def test_help_shows_an_example_and_loads_no_torch(command: str) -> None:
    code = (
        "import sys\nfrom moetrain.cli.launch import app\n"
        f"try:\n    app(['{command}', '--help'])\nfinally:\n    assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    assert f"moetrain launch {command}" in done.stdout
