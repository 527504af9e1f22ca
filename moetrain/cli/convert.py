"""`moetrain convert`: checkpoints into other people's formats."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Convert checkpoints into other formats.", no_args_is_help=True)


class Dtype(StrEnum):
    """What weights are written as."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@app.callback()
def convert() -> None:
    """Convert checkpoints into other formats."""


@app.command("to-hf")
def to_hf(
    checkpoint: Annotated[
        Path, typer.Argument(help="A step folder, a `checkpoints` folder or a run folder (its latest).")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write; must be absent or empty.")],
    dtype: Annotated[Dtype, typer.Option(help="What weights are written as.")] = Dtype.float32,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, such as 500MB or 2GB.")] = "2GB",
    tokenizer: Annotated[
        Path | None, typer.Option(help="A .model, a tokenizer.json or its folder; default: the run's own.")
    ] = None,
    verify: Annotated[
        bool, typer.Option(help="Compare the export's logits with the training model's; needs memory for both.")
    ] = False,
) -> None:
    """Export a checkpoint as a Hugging Face model folder. Needs no GPU and no process group."""
    from moetrain.checkpoint import CheckpointReader, find_step_folder
    from moetrain.convert.hf import export_hf
    from moetrain.convert.verify import LogitsReport, verify_export

    proof: list[LogitsReport] = []
    with CheckpointReader(find_step_folder(checkpoint)) as reader:
        report = export_hf(
            reader,
            out,
            dtype=dtype.value,
            max_shard_size=max_shard_size,
            tokenizer=tokenizer,
            check=(lambda folder: proof.append(verify_export(reader, folder))) if verify else None,
            announce=typer.echo,
        )
    typer.echo(f"wrote {report.folder}: {report.tensors} tensors in {len(report.weight_files)} weight file(s)")
    for logits in proof:
        typer.echo(
            f"verified: {logits.positions} positions, largest difference of a logit {logits.max_abs:.2g}, "
            f"best token agrees at {logits.argmax_agreement:.1%}"
        )
