"""`moetrain train`: one rank of a run."""

from __future__ import annotations

import os

import typer

from moetrain.cli.arguments import Words, split_words

app = typer.Typer(add_completion=False)


@app.command()
def train(arguments: Words) -> None:
    """Train as one rank: alone when started by hand, or one of many under torchrun.

    Example: torchrun --nproc-per-node 4 -m moetrain train configs/run.yaml training.train_iters=1000
    """
    from moetrain.config.loader import load_config

    config = load_config(*split_words(arguments))
    # After the config, which needs no torch and is where most mistakes are.
    from moetrain.runtime.preemption import exit_with_parent
    from moetrain.train.run import train as run

    if "TORCHELASTIC_RUN_ID" in os.environ:
        exit_with_parent()
    run(config)
