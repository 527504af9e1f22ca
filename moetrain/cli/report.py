"""`moetrain report`: a run as one HTML page."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from moetrain.errors import DataError, ReportError

if TYPE_CHECKING:
    from moetrain.checkpoint import CheckpointReader
    from moetrain.report.passages import Reading
    from moetrain.report.run_folder import RunFolder
    from moetrain.report.trace import RoutingTrace

app = typer.Typer(add_completion=False)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="a run folder (run.dir); the run may be going on")],
    out: Annotated[Path | None, typer.Option(help="the page to write; default: report.html in the run folder")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the page if it is there")] = False,
    text: Annotated[
        Path | None, typer.Option(help="look at this text (UTF-8; blank lines separate passages), not held-out data")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="look at this text")] = None,
    checkpoint: Annotated[int | None, typer.Option(min=0, help="step of the checkpoint; default: the newest")] = None,
    metrics_only: Annotated[
        bool, typer.Option("--metrics-only", help="run no model: curves and loads over steps alone")
    ] = False,
) -> None:
    """Write one HTML page about a run: its curves, the load of every expert over time, and each token's routing.

    The page needs no network. Text goes through the newest checkpoint in this process, in fp32 on CPU, whatever layout
    trained it. Metrics alone make the page of a run that has no checkpoint yet.
    """
    from moetrain.report.page import check_target, render, write_page
    from moetrain.report.run_folder import open_run

    _check_options(text, prompt, checkpoint, metrics_only)
    target = out or run / "report.html"
    folder = open_run(run)
    check_target(target, overwrite)
    looked = (
        Looked(None, "Not asked for (--metrics-only).") if metrics_only else _look(folder, text, prompt, checkpoint)
    )
    if looked.trace is None and not metrics_only:
        typer.echo(f"metrics alone: {looked.why_not}", err=True)
    options = {"--out": out, "--text": text, "--prompt": prompt, "--checkpoint": checkpoint}
    html = render(folder, looked.trace, looked.why_not, _command(run, options, metrics_only), looked.world_size)
    write_page(html, target, overwrite)
    typer.echo(f"wrote {target} ({len(html.encode()) / 1e6:.2f} MB)")


class Looked(NamedTuple):
    """What a checkpoint did with text, or why none was read; and the number of ranks that saved the checkpoint."""

    trace: RoutingTrace | None
    why_not: str = ""
    world_size: int | None = None


def _look(folder: RunFolder, text: Path | None, prompt: str | None, step: int | None) -> Looked:
    """Read text with a checkpoint. What is missing is an error only to someone who asked for it: the curves of a run
    whose data lie elsewhere are worth a page."""
    saved = folder.checkpoint(step)
    own_text = text is not None or prompt is not None
    if saved is None:
        if own_text:
            raise ReportError(f"{folder.path}: has no checkpoint to read text with; leave --text and --prompt out")
        return Looked(None, "This run has no checkpoint yet, so there is no model to read text with.")
    from moetrain.checkpoint import CheckpointReader
    from moetrain.report.tracing import trace_routing

    with CheckpointReader(saved) as reader:
        size = reader.layout.get("world_size")
        try:
            reading = _reading(reader, text, prompt)
        except (DataError, ReportError) as error:
            if own_text or step is not None:
                raise
            return Looked(None, f"No text was read: {error}.", size)
        typer.echo(f"reading {reading.tokens:,} tokens with the checkpoint of step {reader.step:,}", err=True)
        return Looked(trace_routing(reader, reading), world_size=size)


def _check_options(text: Path | None, prompt: str | None, checkpoint: int | None, metrics_only: bool) -> None:
    given = {"--text": text, "--prompt": prompt, "--checkpoint": checkpoint}
    named = [name for name, value in given.items() if value is not None]
    if metrics_only and named:
        raise ReportError(f"--metrics-only runs no model, so {' and '.join(named)} would mean nothing: leave one out")
    if text is not None and prompt is not None:
        raise ReportError("--text and --prompt both say what to read: give one of them")


def _command(run: Path, options: dict[str, Any], metrics_only: bool) -> str:
    """What makes this page, for whoever finds it later."""
    words = ["moetrain", "report", str(run)]
    words += [word for name, value in options.items() if value is not None for word in (name, str(value))]
    return shlex.join([*words, *["--metrics-only"] * metrics_only])


def _reading(reader: CheckpointReader, text: Path | None, prompt: str | None) -> Reading:
    """The text, in the tokens of the tokenizer that the checkpoint's run names."""
    from moetrain.config.loader import config_from_dict
    from moetrain.data.tokenizers import load_tokenizer
    from moetrain.report.passages import read_held_out, read_text

    config = config_from_dict(reader.config, f"{reader.folder}'s config")
    if config.training.objective.type != "causal_lm":
        raise ReportError(
            f"a model of training.objective.type {config.training.objective.type} does not read text from left to "
            "right, which is all that a page can show so far"
        )
    tokenizer = load_tokenizer(config.data.tokenizer)
    trained_with = reader.extra.get("tokenizer", tokenizer.fingerprint)
    if tokenizer.fingerprint != trained_with:
        raise ReportError(
            f"tokenizer {config.data.tokenizer.path}: is not the one that the checkpoint was trained with (fingerprint "
            f"{tokenizer.fingerprint[:12]}, the checkpoint's is {str(trained_with)[:12]})"
        )
    length = config.model.seq_length
    if prompt is not None:
        return read_text(prompt, "--prompt", tokenizer, length)
    if text is None:
        return read_held_out(config.data, tokenizer, length)
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ReportError(f"--text {text}: cannot be read ({reason})") from error
    return read_text(content, str(text), tokenizer, length)
