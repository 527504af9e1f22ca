"""Renders a Slurm batch script from `slurm/train.sbatch.j2` and submits it."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError

from moetrain.errors import ConfigError, DependencyError
from moetrain.runtime.logs import writing_into
from moetrain.runtime.preemption import LAUNCHED, STOP_FILE

TEMPLATE = "train.sbatch.j2"

# `#SBATCH` lines are read by Slurm, not by a shell, and no quoting is common to all its versions: so a value may hold
# only what needs none.
_WORD = r"[A-Za-z0-9][A-Za-z0-9_.,@+-]*"
_RULES = {
    "name": (_WORD, "letters, digits and _ . , @ + -"),
    "partition": (_WORD, "letters, digits and _ . , @ + -"),
    "account": (_WORD, "letters, digits and _ . , @ + -"),
    "qos": (_WORD, "letters, digits and _ . , @ + -"),
    "reservation": (_WORD, "letters, digits and _ . , @ + -"),
    "constraint": (r"[A-Za-z0-9_.,&|*\[\]()!:-]+", "Slurm's feature expressions, such as a100|h100"),
    "memory": (r"\d+[KMGT]?", "Slurm's sizes, such as 512G; 0 for all of a node"),
    "time_limit": (r"(\d+-)?\d+(:\d{1,2}){0,2}", "Slurm's times, such as 90, 24:00:00 or 2-12:00:00"),
    "module": (r"[A-Za-z_][A-Za-z0-9_.]*", "a Python module's dotted name"),
}
_OPTION = re.compile(r"--[a-z][a-z-]*(=[A-Za-z0-9_.,:=/@+*&|()\[\]!%-]+)?")
_LEAST = {"nodes": 1, "processes_per_node": 1, "gpus_per_node": 0, "signal_seconds": 30, "max_restarts": 0}


@dataclass(frozen=True)
class SlurmJob:
    """What is asked of Slurm. Raises ConfigError at birth on a value that the script could not carry safely."""

    run_dir: Path
    """run folder, on a file system that all nodes share"""
    nodes: int
    processes_per_node: int
    """ranks per node: one per GPU"""
    name: str = "moetrain"
    work_dir: Path = field(default_factory=Path.cwd)
    """where relative paths of the configuration begin"""
    gpus_per_node: int = 0
    """0 asks for none: CPU training, or a cluster whose `sbatch_options` ask in their own way"""
    cpus_per_node: int | None = None
    memory: str | None = None
    time_limit: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    sbatch_options: tuple[str, ...] = ()
    """further options as sbatch takes them: `--gres=gpu:8`, `--exclusive`"""
    signal_seconds: int = 300
    """how long before the time limit the run is asked to save and stop"""
    max_restarts: int = 0
    """times that torchrun may restart the ranks after a crash"""
    env_file: Path | None = None
    """the cluster's own settings (modules, network interface), sourced first"""
    python: str = sys.executable
    module: str = "moetrain"

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ConfigError(f"slurm {name} ({getattr(self, name)}) must be at least {least}")
        if self.cpus_per_node is not None and self.cpus_per_node < self.processes_per_node:
            raise ConfigError(
                f"slurm cpus_per_node ({self.cpus_per_node}) must be at least processes_per_node "
                f"({self.processes_per_node})"
            )
        for name, (pattern, legal) in _RULES.items():
            value = getattr(self, name)
            if value is not None and not re.fullmatch(pattern, value):
                raise ConfigError(f"slurm {name} ({value!r}) is not legal; legal: {legal}")
        if self.time_limit is not None and 0 < (limit := _seconds(self.time_limit)) <= self.signal_seconds:
            raise ConfigError(
                f"slurm signal_seconds ({self.signal_seconds}) must be below time_limit ({self.time_limit}, which is "
                f"{limit} s): each start would be asked to stop at once, and would requeue itself for ever"
            )
        for option in self.sbatch_options:
            if not _OPTION.fullmatch(option):
                raise ConfigError(
                    f"sbatch option {option!r} is not legal; legal: --name or --name=value, without spaces"
                )
        for name in ("run_dir", "work_dir", "env_file"):
            path = getattr(self, name)
            if path is not None and not path.is_absolute():
                raise ConfigError(f"slurm {name} ({path}) must be an absolute path: the job begins on another machine")
        _check_output_path(self.run_dir)

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.processes_per_node

    @property
    def directives(self) -> list[str]:
        """The `#SBATCH` options, in order."""
        optional = {
            "--gpus-per-node": self.gpus_per_node or None,
            "--cpus-per-task": self.cpus_per_node,
            "--mem": self.memory,
            "--time": self.time_limit,
            "--partition": self.partition,
            "--account": self.account,
            "--qos": self.qos,
            "--constraint": self.constraint,
            "--reservation": self.reservation,
        }
        return [
            f"--job-name={self.name}",
            f"--nodes={self.nodes}",
            "--ntasks-per-node=1",
            *(f"{option}={value}" for option, value in optional.items() if value is not None),
            # to the batch shell alone (B:): torchrun would die of the signal and leave its ranks orphaned
            f"--signal=B:USR1@{self.signal_seconds}",
            "--requeue",
            "--open-mode=append",
            f"--output={self.run_dir}/slurm-%j.out",
            *self.sbatch_options,
        ]


def render_sbatch(job: SlurmJob, argv: Sequence[str], template: Path | None = None) -> str:
    """The batch script that runs `python -m <module> <argv>` in `job.world_size` ranks.

    Every value that a shell reads is quoted. `template`: another Jinja template in place of ours. Raises ConfigError
    when a value holds a control character, or the template is missing or broken.
    """
    source = template or template_path()
    environment = Environment(  # a shell script, not HTML: `quote` escapes, and each use of it is tested
        loader=FileSystemLoader(source.parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["quote"] = _quote
    try:
        return environment.get_template(source.name).render(
            job=job,
            arguments=list(argv),
            stop_file=job.run_dir / STOP_FILE,
            launched=LAUNCHED,
            omp_threads=max(1, (job.cpus_per_node or job.processes_per_node) // job.processes_per_node),
        )
    except TemplateError as error:
        raise ConfigError(f"Slurm template {source}: {type(error).__name__}: {error}") from error


def submit(script: str, run_dir: Path) -> str:
    """Writes the script to `<run_dir>/submit-<UTC time>.sbatch`, hands it to sbatch, and returns the job id.

    Raises DependencyError without sbatch on PATH, ConfigError when `run_dir` cannot be written, or Slurm refuses the
    job, with Slurm's words.
    """
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise DependencyError(
            "sbatch is not on PATH: submit from a login node of the cluster, or print the script with --dry-run"
        )
    path = run_dir / f"submit-{datetime.now(UTC).strftime('%Y%m%dT%H%M%S-%f')}.sbatch"
    with writing_into(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(script, encoding="utf-8")
    done = subprocess.run([sbatch, "--parsable", str(path)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ConfigError(f"sbatch refused {path} (exit code {done.returncode}): {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]  # "id" or "id;cluster"


def template_path() -> Path:
    """Our template: in an installed package beside this module, in a checkout under `slurm/`."""
    here = Path(__file__).resolve()
    candidates = (here.parent / "templates" / TEMPLATE, here.parents[2] / "slurm" / TEMPLATE)
    for path in candidates:
        if path.is_file():
            return path
    raise DependencyError(
        f"the Slurm template is missing from this installation; looked for {', '.join(map(str, candidates))}"
    )


def _seconds(time_limit: str) -> int:
    """Of minutes[:seconds], hours:minutes:seconds or days-hours[:minutes[:seconds]]; 0 is Slurm's word for no limit."""
    days, dash, rest = time_limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(n * unit for n, unit in zip(parts, units, strict=False))


def _quote(value: object) -> str:
    """One shell word. Control characters are refused: nothing legal needs them, and logs would show another command."""
    text = str(value)
    if any(ord(char) < 32 or ord(char) == 127 for char in text):
        raise ConfigError(f"{text!r} holds a control character, which has no place in a batch script")
    return shlex.quote(text)


def _check_output_path(run_dir: Path) -> None:
    """The run folder also stands on an `#SBATCH` line, where Slurm expands % and splits at blanks."""
    if not re.fullmatch(r"[A-Za-z0-9_./@+=,:-]+", str(run_dir)):
        raise ConfigError(
            f"run.dir ({str(run_dir)!r}) is not legal under Slurm; legal: letters, digits and _ . / @ + = , : -"
        )
