"""`moetrain bench`: our operators against those of others, and what a save costs, on this machine."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moetrain.bench.catalog import BENCHMARKS, count_points
from moetrain.bench.report import HOW_TO_READ, Section, check_target, machine_lines, sections, to_json, write
from moetrain.bench.results import CaseResult
from moetrain.bench.runner import Report, run
from moetrain.bench.settings import DEVICES, DTYPES, ROUTINGS, Settings, default_settings
from moetrain.cli.arguments import split_choices, split_numbers
from moetrain.cli.progress import Progress
from moetrain.errors import ConfigError

_CHOICES = {"dtype": ("dtypes", DTYPES), "routing": ("routing", ROUTINGS)}

app = typer.Typer(no_args_is_help=True, help="Operators against those of others, and saves, measured on this machine.")


@app.command()
def ops(
    device: Annotated[str, typer.Option(help="cpu or cuda; each has its own default sizes")] = "cpu",
    threads: Annotated[str | None, typer.Option(help="CPU threads, such as 1,2: one process each")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"of {','.join(DTYPES)}")] = None,
    experts: Annotated[str | None, typer.Option(help="numbers of experts, such as 8,64")] = None,
    ffn: Annotated[str | None, typer.Option(help="hidden units of an expert, such as 1024,2048")] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="hidden size")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="tokens of a batch")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="experts of a token")] = None,
    routing: Annotated[str | None, typer.Option(help=f"of {','.join(ROUTINGS)}")] = None,
    seq: Annotated[int | None, typer.Option(min=1, help="sequence length of the attention benchmarks")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"measure these alone, commas or repeated: {', '.join(BENCHMARKS)}"),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="seconds to measure for; every point gets three rounds at least, however long they take"),
    ] = None,
    write_to: Annotated[Path | None, typer.Option("--write", help="write a Markdown page of the tables")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON with every time instead of tables")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress on standard error")] = False,
) -> None:
    """Measure each operator against named baselines: torch, transformers, DeepSpeed.

    All results are compared before anything is timed; one that differs is an error. A baseline that cannot run here is
    listed with the reason. Wants a machine that does nothing else.
    """
    lists = {"threads": threads, "experts": experts, "ffn": ffn, "dtype": dtype, "routing": routing}
    numbers = {"hidden": hidden, "tokens": tokens, "top_k": top_k, "seq": seq, "budget": budget}
    settings = _settings(device, lists, numbers, only or [])
    if write_to is not None:
        check_target(write_to)
    with Progress("bench ops", count_points(settings), enabled=not quiet) as progress:
        report = run(settings, lambda case: progress.advance(_label(case)))
    if write_to is not None:
        write(report, write_to)
    if as_json:
        typer.echo(json.dumps(to_json(report), indent=2))
    else:
        _print(report)


@app.command()
def checkpoint(
    sizes: Annotated[str, typer.Option(help="megabytes of state, such as 10,100,1000")] = "10,30,100,300,1000",
    folder: Annotated[Path, typer.Option(help="on the disk to measure; nothing stays in it")] = Path(),
    rounds: Annotated[int, typer.Option(min=1, help="of each size")] = 5,
    pass_seconds: Annotated[
        float, typer.Option(min=0.001, max=3600, help="the work between a save and the next update")
    ] = 0.5,
    write_to: Annotated[Path | None, typer.Option("--write", help="write a Markdown page of the table")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON with every time instead of a table")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress on standard error")] = False,
) -> None:
    """Measure how long a save in the background stalls training, against a synchronous one and a plain copy."""
    megabytes = split_numbers("--sizes", sizes)
    from moetrain.bench import saves

    if write_to is not None:
        check_target(write_to, saves.MARK)
    command = f"moetrain bench checkpoint --sizes {','.join(map(str, megabytes))} --rounds {rounds}"
    command += f" --pass-seconds {pass_seconds:g}"

    def tell(what: str) -> None:
        if not quiet:
            typer.echo(what, err=True)

    report = saves.run([n * 10**6 for n in megabytes], folder, rounds, pass_seconds, command, tell)
    if write_to is not None:
        saves.write(report, write_to)
    if as_json:
        typer.echo(json.dumps(saves.to_json(report), indent=2))
        return
    head, *rows = saves.table(report, quartiles=False)
    shown = Table(*head, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        shown.add_row(*row)
    console = Console(highlight=False)
    console.print(shown)
    console.print(Text("\n".join([saves.HOW_TO_READ, *saves.machine_lines(report)])))


def _settings(device: str, lists: dict[str, str | None], numbers: dict[str, float | None], only: list[str]) -> Settings:
    """The device's defaults, replaced by what was given. ConfigError for what does not fit."""
    split_choices("--device", device, DEVICES)
    if device == "cuda" and lists["threads"] is not None:
        raise ConfigError(f"--threads ({lists['threads']}) means nothing with --device cuda; leave it out")
    given: dict[str, Any] = {name: value for name, value in numbers.items() if value is not None}
    for name, text in lists.items():
        if text is not None and name in _CHOICES:
            field, legal = _CHOICES[name]
            given[field] = split_choices(f"--{name}", text, legal)
        elif text is not None:
            given[name] = split_numbers(f"--{name}", text)
    chosen = [name for names in only for name in split_choices("--only", names, tuple(BENCHMARKS))]
    cores = len(os.sched_getaffinity(0))
    settings = replace(default_settings(device, cores), only=tuple(dict.fromkeys(chosen)), **given)
    _check(settings, cores)
    return settings


def _check(settings: Settings, cores: int) -> None:
    """The rules between settings, and with the machine."""
    if not settings.budget > 0:  # NaN is not, either
        raise ConfigError(f"--budget ({settings.budget:g}) must be above 0 seconds")
    if max(settings.threads) > cores:
        raise ConfigError(f"--threads ({max(settings.threads)}) must not exceed the cores of this process ({cores})")
    fewest = min(settings.experts)
    if settings.top_k > fewest:
        raise ConfigError(f"--top-k ({settings.top_k}) must not exceed the fewest --experts ({fewest})")


def _label(case: CaseResult) -> str:
    return f"{case.benchmark} {case.point.label()}"


def _print(report: Report) -> None:
    console = Console(highlight=False)
    for section in sections(report):
        console.print(Text(f"\n{section.name}: {section.title} ({section.sizes})", "bold"))
        if section.rows:
            console.print(_table(section))
        for note in section.notes:
            console.print(Text(note, "yellow"))
    console.print()
    for line in [*machine_lines(report), HOW_TO_READ]:
        console.print(Text(line))


def _table(section: Section) -> Table:
    """Baselines below their case: beside one another they would need a very wide terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"case / {section.relation}", overflow="fold")
    for name in ("ours, ms", "rate", "of peak", "ratio"):
        table.add_column(name, no_wrap=True, justify="right")
    for row in section.rows:
        threads = f", {row.threads} threads" if row.threads not in ("-", "1") else ""
        # Text, not str: rich would read brackets as markup.
        ours = (row.case + threads, row.milliseconds, row.rate, row.of_peak)
        table.add_row(*(Text(cell, "bold") for cell in ours))
        for who, ratio in row.ratios.items():
            table.add_row(Text(f"  {who}"), "", "", "", Text(ratio))
    return table


@app.command()
def export(
    size: Annotated[float, typer.Option(min=0.1, help="GB of fp32 weights")] = 20.0,
    folder: Annotated[Path, typer.Option("--dir", help="where to write, on the disk that is to be measured")] = Path(),
    dtype: Annotated[str, typer.Option(help="of the export: float32 or bfloat16")] = "float32",
    write_to: Annotated[Path | None, typer.Option("--write", help="write a Markdown page of the table")] = None,
) -> None:
    """Export a checkpoint of zeros to Hugging Face, and copy the files: memory, time, rates. An error where memory
    exceeds twice the largest block of weights and 500 MB. Everything it writes is deleted."""
    from moetrain.bench.export import measure_export, page, rows

    result = measure_export(round(size * 1e9), folder, dtype)
    for name, value in rows(result, dtype):
        typer.echo(f"{name:<42}{value}")
    if write_to is not None:
        write_to.write_text(page(result, dtype), encoding="utf-8")
