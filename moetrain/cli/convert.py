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


@app.command("from-hf")
def from_hf(
    folder: Annotated[
        Path,
        typer.Argument(help="A Hugging Face model folder with safetensors weights."),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write; must be absent or empty.")],
    seq_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a training sequence; default: the longest that config.json allows, or 512 where it sets no "
            "limit."
        ),
    ] = None,
    dropped: Annotated[
        Dropped | None,
        typer.Option(
            help="Of a Switch Transformer, what a token without a place at its expert gets: nothing (the default), as "
            "transformers has it today, or the layer's input, as HyperMoE's released code has it."
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            help="Compare the logits, of an encoder the hidden states, with those of transformers; needs memory for "
            "both models."
        ),
    ] = False,
) -> None:
    """Import a Hugging Face model as a checkpoint to start from, with a config. Runs no code of the folder."""
    from moetrain.convert.from_hf import CONFIG, import_hf
    from moetrain.convert.hidden_states import StatesReport

    choice = None if dropped is None else dropped.value
    report = import_hf(folder, out, seq_length, verify, choice, announce=typer.echo)
    typer.echo(f"wrote {report.folder}: {report.tensors} tensors of a {report.architecture} model, and {CONFIG}")
    for note in report.notes:
        typer.echo(f"note: {note}")
    if report.proof is not None:
        largest = (
            f"hidden state {report.proof.max_relative:.2g} of the largest one"
            if isinstance(report.proof, StatesReport)
            else f"logit {report.proof.max_abs:.2g}"
        )
        typer.echo(f"verified: {report.proof.positions} positions, largest difference of a {largest}")
