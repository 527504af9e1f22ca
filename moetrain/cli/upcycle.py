"""`moetrain upcycle`: a checkpoint of a dense or MoE model as the start of a larger one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from moetrain.cli.arguments import Words, split_words

app = typer.Typer(add_completion=False)


@app.command()
def upcycle(
    source: Annotated[
        Path,
        typer.Argument(
            help="a step folder, a `checkpoints` folder or a run folder (its latest); or a Hugging Face folder",
            metavar="SOURCE",
        ),
    ],
    words: Words,
    out: Annotated[Path, typer.Option(help="the folder to write; must be absent or empty")],
    noise: Annotated[
        float, typer.Option(help="standard deviation of noise on every copied weight; then the logits differ")
    ] = 0.0,
    allow_change: Annotated[
        bool,
        typer.Option("--allow-change", help="accept another router, gates that do not sum to 1, or other capacities"),
    ] = False,
    verify: Annotated[
        bool, typer.Option(help="compare the logits of source and target; each must fit in memory")
    ] = True,
) -> None:
    """Turn a checkpoint into the start of a MoE, HyperMoE or DA-MoE model that gives the same logits.

    FILES and KEY=VALUE describe the run to come. Start it with checkpoint.load=OUT
    checkpoint.load_weights_only=true, on any layout.
    """
    from moetrain.checkpoint import CheckpointReader
    from moetrain.config.loader import load_config
    from moetrain.convert.upcycle import upcycle as write

    files, overrides = split_words(words)
    config = load_config(files, overrides)
    with _step_folder(source, out) as folder, CheckpointReader(folder) as reader:
        report = write(reader, config, out, noise, allow_change, verify, announce=typer.echo)
    counts = ", ".join(f"{number} {kind}" for kind, number in sorted(report.sources.items()))
    typer.echo(f"wrote {report.folder}: {report.parameters:,} parameters in tensors {counts}")
    for change in report.changes:
        typer.echo(f"does not preserve the function: {change}")
    if report.difference is not None:
        typer.echo(
            f"compared: {report.difference.positions} positions, largest difference of a logit "
            f"{report.difference.max_abs:.2g}"
        )


@contextmanager
def _step_folder(source: Path, out: Path) -> Iterator[Path]:
    """The checkpoint that is meant. A Hugging Face folder is imported for the while, on the disk of `out`."""
    from moetrain.checkpoint import find_step_folder
    from moetrain.convert.from_hf import import_hf

    if not (source / "config.json").is_file():
        yield find_step_folder(source)
        return
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", suffix=".imported", dir=out.absolute().parent) as folder:
        yield import_hf(source, Path(folder) / "step", announce=typer.echo).folder
