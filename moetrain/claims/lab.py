"""Trains every arm of a study with every seed, several at a time, and goes on where an earlier call was interrupted.

Each training is an ordinary run of one process in a folder of its own, `<out>/<study>/<preset>/<arm>/seed-<n>`: it
saves, is stopped and resumes like any other. Arms share the seed, and with it the order of the data and the start of
all the weights that they have in common, so that differences are taken in pairs.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from moetrain.claims.measures import Measured, is_finished, measure
from moetrain.claims.study import Arm, Outcome, Study
from moetrain.config.loader import config_to_dict, load_config
from moetrain.config.schema import RunConfig
from moetrain.errors import ConfigError, MoetrainError
from moetrain.runtime.preemption import exit_with_parent
from moetrain.train.run import train

_TAIL_LINES = 15
_GRACE_SECONDS = 60.0


@dataclass(frozen=True)
class Job:
    """One training."""

    arm: Arm
    seed: int
    config: RunConfig

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.config.run.dir)

    @property
    def label(self) -> str:
        """For people."""
        return f"{self.arm.name}, seed {self.seed}"


Results = Mapping[str, Sequence[Measured]]
"""By arm, in the order of the seeds."""


class Lab:
    """A study, its seeds, and the folder in which its runs lie."""

    def __init__(self, study: Study, seeds: Sequence[int], files: Sequence[Path], paths: Sequence[str], folder: Path):
        """`files` are the preset's config files; `paths` overrides that lead to the data."""
        self.study, self.seeds, self.folder = study, list(seeds), folder
        self._files, self._paths = list(files), list(paths)

    def check(self) -> None:
        """Whether every arm is a legal config and every folder is absent or of the same config; arms whose settings
        come from others are checked once those are known.

        Raises:
            ConfigError: with the arm's name.
        """
        for arm in self.study.arms:
            if arm.after is None:
                for job in self._jobs(arm, {}):
                    _check_folder(job)

    def train(self, jobs_at_once: int, on_done: Callable[[str], None]) -> Results:
        """Train whatever is missing; `on_done` hears the label of every training, the finished ones' too.

        Raises:
            MoetrainError: a training failed; the others are stopped, saved, and go on in the next call.
        """
        done: dict[str, list[Measured]] = {}
        ready = [arm for arm in self.study.arms if arm.after is None]
        while ready:
            outcomes = {name: _outcome(runs) for name, runs in done.items()}
            jobs = [job for arm in ready for job in self._jobs(arm, outcomes)]
            for job in jobs:
                _check_folder(job)
            _train_all(jobs, jobs_at_once, on_done)
            for job in jobs:
                done.setdefault(job.arm.name, []).append(measure(job.folder, job.config))
            ready = [a for a in self.study.arms if a.name not in done and a.after in done]
        return {arm.name: done[arm.name] for arm in self.study.arms}

    @property
    def num_trainings(self) -> int:
        """Of the whole study."""
        return len(self.study.arms) * len(self.seeds)

    def config(self, arm: str, seed: int, outcomes: Mapping[str, Outcome]) -> RunConfig:
        """The run of an arm with a seed."""
        return self._job(self.study.arm(arm), seed, outcomes).config

    def _jobs(self, arm: Arm, outcomes: Mapping[str, Outcome]) -> Iterator[Job]:
        return (self._job(arm, seed, outcomes) for seed in self.seeds)

    def _job(self, arm: Arm, seed: int, outcomes: Mapping[str, Outcome]) -> Job:
        folder = self.folder / arm.name / f"seed-{seed}"
        settings = [
            *self._paths,
            *arm.overrides(outcomes),
            f"run.dir={folder}",
            f"run.name={arm.name}-{seed}",
            f"training.seed={seed}",
        ]
        try:
            return Job(arm, seed, load_config(self._files, settings))
        except ConfigError as error:
            raise ConfigError(f"arm {arm.name} ({arm.title}): {error}") from error


def _outcome(runs: Sequence[Measured]) -> Outcome:
    count = len(runs)
    return Outcome(loss=sum(r.loss for r in runs) / count, mean_k=sum(r.mean_k for r in runs) / count)


def _check_folder(job: Job) -> None:
    """Refuse to go on with a run that other settings began."""
    written = job.folder / "config.yaml"
    if written.is_file() and config_to_dict(load_config([written])) != config_to_dict(job.config):
        raise ConfigError(
            f"{job.folder} holds a training with other settings (its config.yaml); delete that folder, or name "
            "another --out"
        )


# --- processes ------------------------------------------------------------------------------------------------------


def _train_all(jobs: Sequence[Job], at_once: int, on_done: Callable[[str], None]) -> None:
    """Importing torch and Megatron takes seconds, so one server does it and forks the trainings from it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moetrain.claims.quiet_start"])
    waiting = list(jobs)
    running: dict[int, tuple[Job, ForkServerProcess]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                if is_finished(job.folder):
                    on_done(job.label)
                    continue
                process = context.Process(target=_train_one, args=(job.config,), daemon=True)
                process.start()
                running[process.sentinel] = (job, process)
            for sentinel in wait(list(running)) if running else ():
                assert isinstance(sentinel, int)
                job, process = running.pop(sentinel)
                process.join()
                if not is_finished(job.folder):
                    raise MoetrainError(f"the training {job.label} ended early:\n{_last_words(job)}")
                on_done(job.label)
    finally:
        _stop([process for _, process in running.values()])


def _train_one(config: RunConfig) -> None:
    """In a process of its own: the run's words go to its console.log."""
    exit_with_parent()
    folder = Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    words = os.open(folder / "console.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(words, 1)
    os.dup2(words, 2)
    # A terminal's Ctrl-C reaches every process of its group; the laboratory passes on one request to each.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    train(config)


def _stop(processes: Sequence[ForkServerProcess]) -> None:
    """Ask trainings to save and leave; end those that do not."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in processes:
        with suppress(KeyboardInterrupt):
            process.join(max(0.0, deadline - time.monotonic()))
        process.kill()


def _last_words(job: Job) -> str:
    console = job.folder / "console.log"
    if not console.is_file():
        return "it said nothing"
    return "\n".join(console.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:])
