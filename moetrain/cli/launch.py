"""`moetrain launch`: start the ranks of a run on this machine, or through Slurm."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moetrain.cli.arguments import Words, split_words

if TYPE_CHECKING:
    from moetrain.config.schema import RunConfig

app = typer.Typer(no_args_is_help=True, help="Start the ranks of a run: on this machine (local) or through Slurm.")


@app.command()
def local(
    arguments: Words,
    num_processes: Annotated[
        int, typer.Option("--num-processes", "-n", min=1, help="ranks: one per GPU, or CPU ranks")
    ] = 1,
    max_restarts: Annotated[int, typer.Option(min=0, help="times to restart all ranks after a crash")] = 0,
) -> None:
    """Train on this machine.

    Example: moetrain launch local -n 4 configs/demo.yaml training.train_iters=100
    """
    from moetrain.launch.local import launch_local

    config = _checked(arguments, num_processes)
    code = launch_local(
        num_processes,
        ["train", *arguments],
        run_dir=Path(config.run.dir),
        device=config.runtime.device,
        cpu_threads=config.runtime.cpu_threads,
        max_restarts=max_restarts,
    )
    raise typer.Exit(code)


@app.command()
def slurm(
    arguments: Words,
    nodes: Annotated[int, typer.Option(min=1, help="nodes")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs of a node, and ranks on it; 0: train on CPU")] = 0,
    processes_per_node: Annotated[int | None, typer.Option(min=1, help="ranks per node; default: one per GPU")] = None,
    cpus_per_node: Annotated[int | None, typer.Option(min=1, help="CPUs of a node for all its ranks")] = None,
    memory: Annotated[str | None, typer.Option(help="memory of a node: 512G; 0: all")] = None,
    time_limit: Annotated[
        str | None, typer.Option("--time", help="time limit; the run saves and requeues itself before it")
    ] = None,
    name: Annotated[str | None, typer.Option(help="job name; default: run.name")] = None,
    partition: Annotated[str | None, typer.Option(help="partition")] = None,
    account: Annotated[str | None, typer.Option(help="account")] = None,
    qos: Annotated[str | None, typer.Option(help="quality of service")] = None,
    constraint: Annotated[str | None, typer.Option(help="node features: 'a100|h100'")] = None,
    reservation: Annotated[str | None, typer.Option(help="reservation")] = None,
    sbatch_option: Annotated[
        list[str] | None, typer.Option("--sbatch", help="further sbatch option: --sbatch=--exclusive")
    ] = None,
    signal_seconds: Annotated[
        int, typer.Option(min=30, help="how long before the time limit the run saves and stops")
    ] = 300,
    max_restarts: Annotated[int, typer.Option(min=0, help="times to restart the ranks after a crash")] = 0,
    env_file: Annotated[
        Path | None, typer.Option(help="shell file with the cluster's settings: slurm/env/<cluster>.sh")
    ] = None,
    template: Annotated[Path | None, typer.Option(help="own Jinja template in place of slurm/train.sbatch.j2")] = None,
    do_submit: Annotated[
        bool, typer.Option("--submit/--dry-run", help="hand the script to sbatch, or print it")
    ] = False,
) -> None:
    """Train through Slurm: print the batch script (--dry-run, the default), or submit it (--submit) and print its id.

    Example: moetrain launch slurm --nodes 2 --gpus-per-node 8 --time 24:00:00 --submit configs/run.yaml
    """
    from moetrain.errors import ConfigError
    from moetrain.launch.slurm import SlurmJob, render_sbatch, submit

    ranks = processes_per_node or gpus_per_node
    if not ranks:
        raise ConfigError("launch slurm needs --gpus-per-node, or --processes-per-node for ranks on CPU")
    for path in (env_file, template):
        if path is not None and not path.is_file():
            raise ConfigError(f"{path} is not a file")
    config = _checked(arguments, nodes * ranks)
    job = SlurmJob(
        run_dir=Path(config.run.dir).resolve(),
        nodes=nodes,
        processes_per_node=ranks,
        name=name or config.run.name,
        work_dir=Path.cwd(),
        gpus_per_node=gpus_per_node,
        cpus_per_node=cpus_per_node,
        memory=memory,
        time_limit=time_limit,
        partition=partition,
        account=account,
        qos=qos,
        constraint=constraint,
        reservation=reservation,
        sbatch_options=tuple(sbatch_option or ()),
        signal_seconds=signal_seconds,
        max_restarts=max_restarts,
        env_file=env_file.resolve() if env_file else None,
        python=sys.executable,
    )
    script = render_sbatch(job, ["train", *arguments], template)
    typer.echo(submit(script, job.run_dir) if do_submit else script, nl=do_submit)


def _checked(arguments: list[str], world_size: int) -> RunConfig:
    """The run that `arguments` describe, refused here and once rather than on every rank. Raises ConfigError."""
    from moetrain.config.layout import check_layout
    from moetrain.config.loader import load_config

    config = load_config(*split_words(arguments))
    check_layout(config, world_size)
    return config
