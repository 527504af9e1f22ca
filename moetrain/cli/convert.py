"""`moetrain convert`: checkpoints into other people's formats, and back."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Convert checkpoints into other formats, and back.", no_args_is_help=True)


class Dtype(StrEnum):
    """What weights are written as."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Dropped(StrEnum):
    """What a token gets that finds no place at its expert."""

    zero = "zero"
    input = "input"


@app.callback()
def convert() -> None:
    """Convert checkpoints into other formats, and back."""


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
    architecture: Annotated[
        str,
        typer.Option(
            help="auto: the first stock architecture that computes exactly this model, else moetrain, whose code "
            "travels along; or moetrain, mixtral, qwen3_moe, olmoe, dots1, llama, qwen2, qwen3."
        ),
    ] = "auto",
    verify: Annotated[
        bool, typer.Option(help="Compare the export's logits with the training model's; needs memory for both.")
    ] = False,
) -> None:
    """Export a checkpoint as a Hugging Face model folder, without a GPU. A killed export goes on when repeated."""
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
            architecture=architecture,
            check=(lambda folder: proof.append(verify_export(reader, folder))) if verify else None,
            announce=typer.echo,
        )
    typer.echo(
        f"wrote {report.folder} as {report.architecture}: {report.tensors} tensors in "
        f"{len(report.weight_files)} weight file(s)"
    )
    for logits in proof:
        typer.echo(
            f"verified: {logits.positions} positions, largest difference of a logit {logits.max_abs:.2g}, "
            f"best token agrees at {logits.argmax_agreement:.1%}"
        )


@app.command("from-switch")
def from_switch(
    source: Annotated[Path, typer.Argument(help="A Hugging Face folder of a Switch Transformer.", metavar="DIR")],
    out: Annotated[Path, typer.Argument(help="The folder to write; must be absent or empty.")],
    seq_length: Annotated[
        int, typer.Option(min=1, help="Tokens of a sample; a run that starts here may change it.")
    ] = 512,
    dropped: Annotated[
        Dropped,
        typer.Option(
            help="What a token without a place at its expert gets: nothing, as transformers has it today, or the "
            "layer's input, as HyperMoE's released code has it."
        ),
    ] = Dropped.zero,
    verify: Annotated[
        bool, typer.Option(help="Compare hidden states with transformers'; needs memory for both models.")
    ] = True,
) -> None:
    """Import the encoder of a Switch Transformer: a checkpoint, its tokenizer, and a config.yaml to start from."""
    from moetrain.convert.switch import import_switch

    report = import_switch(source, out, seq_length, dropped.value, verify, announce=typer.echo)
    typer.echo(f"wrote {report.folder}: {report.parameters:,} parameters; {report.unused} tensors of the decoder left")
    for note in report.notes:
        typer.echo(f"left out, {note}")
    if report.difference is not None:
        typer.echo(f"verified: largest difference of a hidden state {report.difference:.2g} of the largest one")


@app.command("from-hf")
def from_hf(
    folder: Annotated[Path, typer.Argument(help="A Hugging Face model folder with safetensors weights.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; must be absent or empty.")],
    seq_length: Annotated[
        int | None, typer.Option(help="Tokens of a training sequence; default: the longest that config.json allows.")
    ] = None,
    verify: Annotated[
        bool, typer.Option(help="Compare the logits with those of transformers; needs memory for both models.")
    ] = False,
) -> None:
    """Import a Hugging Face model as a checkpoint to start from, with a config. Runs no code of the folder."""
    from moetrain.convert.from_hf import CONFIG, import_hf

    report = import_hf(folder, out, seq_length=seq_length, verify=verify, announce=typer.echo)
    typer.echo(f"wrote {report.folder}: {report.tensors} tensors of a {report.architecture} model, and {CONFIG}")
    for note in report.notes:
        typer.echo(f"note: {note}")
    if report.logits is not None:
        typer.echo(
            f"verified: {report.logits.positions} positions, largest difference of a logit {report.logits.max_abs:.2g}"
        )
