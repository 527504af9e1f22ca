"""The `moetrain` command: a table of verbs, each imported when it is called, so that `--help` is instant."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Annotated, Any, NamedTuple, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from moetrain import __version__
from moetrain.errors import DependencyError, MoetrainError
from moetrain.runtime.logs import quiet_imports


class Verb(NamedTuple):
    """The module whose `app` (a `typer.Typer`) is the verb, and the line that `--help` shows without importing it."""

    module: str
    summary: str


VERBS = {
    "config": Verb("moetrain.cli.config", "Check, resolve and document configuration files."),
    "data": Verb("moetrain.cli.data", "Train tokenizers and turn text into indexed datasets."),
    "train": Verb("moetrain.cli.train", "Train: one rank of a run; started by torchrun or `moetrain launch`."),
    "launch": Verb("moetrain.cli.launch", "Start the ranks of a run: on this machine or through Slurm."),
    "report": Verb("moetrain.cli.report", "A run as one HTML page: curves, load of the experts, routing of real text."),
    "ckpt": Verb("moetrain.cli.ckpt", "List, look into, check, compare and thin out checkpoints."),
    "convert": Verb("moetrain.cli.convert", "Checkpoints to Hugging Face, and models from there."),
    "upcycle": Verb("moetrain.cli.upcycle", "A dense or MoE checkpoint as the start of a larger model, same logits."),
    "demo": Verb("moetrain.cli.demo", "From text to an exported model on this machine, in minutes."),
    "bench": Verb("moetrain.cli.bench", "Our operators against those of others, and saves, measured on this machine."),
    "claims": Verb("moetrain.cli.claims", "The papers' claims, tested on this machine."),
    "doctor": Verb("moetrain.cli.doctor", "What is installed, what is missing, and what each piece changes."),
}


class LazyGroup(TyperGroup):
    """Lists the table's summaries and imports a verb's module only to run it."""

    def __init__(self, **attributes: Any) -> None:
        attributes["commands"] = {name: TyperCommand(name=name, help=verb.summary) for name, verb in VERBS.items()}
        super().__init__(**attributes)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        if name in VERBS:
            command = load_verb(name)
        return name, command, rest


def load_verb(name: str) -> Any:
    """The command behind a name in `VERBS`. Raises `DependencyError` when it needs a package that is not installed."""
    try:
        module = importlib.import_module(VERBS[name].module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "moetrain":
            raise  # a broken installation of our own: the traceback is worth more than a sentence
        raise DependencyError(
            f"`moetrain {name}` needs the package {error.name!r}, which is not installed; "
            "`moetrain doctor` lists what is missing"
        ) from error
    command = typer.main.get_command(module.app)
    command.name = name
    # Typer offers to install shell completion with every app; a verb of another command has none of its own.
    command.params = [
        option for option in command.params if option.name not in ("install_completion", "show_completion")
    ]
    return command


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    help="Distributed pretraining of HyperMoE and DA-MoE language models.",
    epilog="MOETRAIN_DEBUG=1 shows the traceback behind an error message.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moetrain {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and leave the process: 0 done, 1 a negative answer, 2 an error of the user's to mend, 130
    interrupted. An error in moetrain itself keeps its traceback."""
    quiet_imports()
    try:
        typer.main.get_command(app)(arguments, prog_name="moetrain")
    except MoetrainError as error:
        if os.environ.get("MOETRAIN_DEBUG") == "1":
            raise
        _print_error(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    raise AssertionError("typer leaves the process by itself")


def _print_error(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    # One Text with soft wrapping: brackets in messages are no markup, and a path in a message stays on one line.
    text = Text.assemble(("error: ", "bold red"), message)
    Console(stderr=True, highlight=False).print(text, soft_wrap=True)
