"""`moetrain claims`: the papers' claims, tested on this machine."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moetrain.claims.counts import Counts, measure_counts
from moetrain.claims.damoe import damoe_study, varying_arms
from moetrain.claims.findings import find
from moetrain.claims.hypermoe import hyper_settings, hypermoe_study
from moetrain.claims.lab import Lab, Results
from moetrain.claims.leak import Leak, measure_leak
from moetrain.claims.material import make_material
from moetrain.claims.page import Facts, check_target, write
from moetrain.claims.study import Study
from moetrain.claims.throughput import FORMS, Ratio, measure_throughput, with_form
from moetrain.cli.claims_glue import glue
from moetrain.cli.progress import Progress
from moetrain.config.loader import load_config
from moetrain.config.schema import RunConfig
from moetrain.errors import ConfigError

_CONFIGS = Path(__file__).parents[2] / "configs" / "claims"
_LEAK_SEQUENCES = 32

app = typer.Typer(no_args_is_help=True, help="The papers' claims, tested on this machine.")


class Preset(StrEnum):
    """Sizes of the trainings."""

    quick = "quick"
    full = "full"


PresetOption = Annotated[Preset, typer.Option(help="quick: whether it works, minutes; full: a report, hours")]
Out = Annotated[Path, typer.Option(help="laboratory folder: data and runs; a second call goes on there")]
Seeds = Annotated[int, typer.Option(min=2, help="paired seeds of each arm")]
Corpus = Annotated[
    list[Path] | None, typer.Option(help=".jsonl or .txt file; default: the Python standard library's text")
]
Jobs = Annotated[int | None, typer.Option(min=1, help="trainings at a time; default: the cores of this process")]
Page = Annotated[Path | None, typer.Option("--write", help="the report; default: <out>/<study>-<preset>.md")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress on standard error")]


@app.command()
def hypermoe(
    preset: PresetOption = Preset.quick,
    out: Out = Path("runs/claims"),
    seeds: Seeds = 5,
    corpus: Corpus = None,
    jobs: Jobs = None,
    page: Page = None,
    quiet: Quiet = False,
) -> None:
    """H1-H6 of HyperMoE (arXiv 2402.12656), with the controls that could refute them."""
    base = _base(preset)
    call = _Call(hypermoe_study(base), preset, out, seeds, corpus or [], jobs, page, quiet)
    call.train()
    call.report(throughput=_throughput(base, rounds=12 if preset is Preset.quick else 60))


@app.command()
def damoe(
    preset: PresetOption = Preset.quick,
    out: Out = Path("runs/claims"),
    seeds: Seeds = 5,
    corpus: Corpus = None,
    jobs: Jobs = None,
    page: Page = None,
    quiet: Quiet = False,
) -> None:
    """D1-D6 of DA-MoE (arXiv 2409.06669), with the controls that could refute them."""
    call = _Call(damoe_study(_base(preset)), preset, out, seeds, corpus or [], jobs, page, quiet)
    call.train()
    call.report(
        leak={arm: call.leaks(arm) for arm in ("leak", "fixed")},
        counts={arm: call.counts(arm) for arm in varying_arms(call.study)},
    )


app.command()(glue)


class _Call:
    """One call of the command. Everything that can be wrong is told before the first training."""

    def __init__(
        self,
        study: Study,
        preset: Preset,
        out: Path,
        seeds: int,
        corpus: Sequence[Path],
        jobs: int | None,
        page: Path | None,
        quiet: bool,
    ) -> None:
        self.study, self.preset, self.seeds, self.quiet = study, preset, list(range(1, seeds + 1)), quiet
        self.page = page or out / f"{study.name}-{preset}.md"
        check_target(self.page)
        cores = len(os.sched_getaffinity(0))
        if jobs is not None and jobs > cores:
            raise ConfigError(f"--jobs ({jobs}) must not exceed the cores of this process ({cores})")
        self.jobs = jobs or cores
        data = out.resolve() / "data"
        folder = out.resolve() / study.name / preset
        self.lab = Lab(study, self.seeds, [_file(preset)], _paths(data), folder)
        self.lab.check()
        self.base = _base(preset)
        self.material = make_material(data, corpus, self.base.model.vocab_size, show_progress=not quiet)

    def train(self) -> None:
        """Whatever is missing."""
        total = self.lab.num_trainings
        with Progress(f"claims {self.study.name}", total, enabled=not self.quiet) as progress:
            self.results: Results = self.lab.train(self.jobs, progress.advance)

    def leaks(self, arm: str) -> list[Leak]:
        """Of every seed of an arm."""
        return [measure_leak(self.lab.folder / arm / f"seed-{seed}", _LEAK_SEQUENCES) for seed in self.seeds]

    def counts(self, arm: str) -> list[Counts]:
        """Of every seed of an arm."""
        return [measure_counts(self.lab.folder / arm / f"seed-{seed}") for seed in self.seeds]

    def report(
        self,
        throughput: Mapping[str, Mapping[str, Ratio]] | None = None,
        leak: Mapping[str, Sequence[Leak]] | None = None,
        counts: Mapping[str, Sequence[Counts]] | None = None,
    ) -> None:
        """The page, and its verdicts on the terminal."""
        findings = find(self.study, self.results)
        facts = Facts(
            study=self.study,
            preset=self.preset,
            base=self.base,
            seeds=self.seeds,
            material=self.material,
            command=f"moetrain claims {self.study.name} --preset {self.preset} --seeds {len(self.seeds)}",
            machine=f"{self.jobs} cores, {platform.machine()}, Python {platform.python_version()}",
            throughput=throughput or {},
            leak=leak or {},
            counts=counts or {},
        )
        write(self.page, facts, findings, self.results)
        for finding in findings:
            typer.echo(f"{finding.claim.name}  {finding.verdict:<10}  {finding.claim.statement}")
        typer.echo(f"report: {self.page}")


def _file(preset: Preset) -> Path:
    return _CONFIGS / f"{preset}.yaml"


def _base(preset: Preset) -> RunConfig:
    return load_config([_file(preset)])


def _paths(data: Path) -> list[str]:
    """Overrides that lead a run to the laboratory's data."""
    paths = {
        "data.tokenizer.path": str(data / "tokenizer.model"),
        "data.train": [{"path": str(data / "train")}],
        "data.valid": [{"path": str(data / "valid")}],
    }
    return [f"{name}={json.dumps(value)}" for name, value in paths.items()]


def _throughput(base: RunConfig, rounds: int) -> dict[str, dict[str, Ratio]]:
    """At the preset's size, where the hyper-expert is as wide as in the study."""
    forms = {form: with_form(base, {**hyper_settings(base), "form": form}) for form in FORMS}
    size = f"{base.model.num_layers} layers of {base.model.hidden_size}"
    return {size: measure_throughput({"plain": base, **forms}, "plain", rounds)}
