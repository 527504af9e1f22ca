"""`moetrain config`: what a configuration says, before anything is started. No torch."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from moetrain.cli.arguments import Words, split_words
from moetrain.config.layout import ParallelLayout, check_layout, smallest_world
from moetrain.config.loader import dump_yaml, fingerprint, json_schema, load_config
from moetrain.config.model import ModelConfig
from moetrain.config.moe import MoEConfig
from moetrain.config.relatives import capacities, relatives_used
from moetrain.config.schema import RunConfig
from moetrain.config.size import flops_per_token, parameter_count
from moetrain.moe.memory import dispatch_bound

app = typer.Typer(no_args_is_help=True, help="Check, resolve and document configuration files.")


@app.command()
def check(
    words: Words,
    world_size: Annotated[
        int | None,
        typer.Option("--world-size", "-n", min=1, help="processes that the run will have", show_default=False),
    ] = None,
) -> None:
    """Validate files and overrides, and say what the run is.

    Example: moetrain config check configs/demo.yaml parallel.pipeline=2 --world-size 4
    """
    config = load_config(*split_words(words))
    layout = check_layout(config, world_size) if world_size is not None else None
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, text in _summary(config, layout):
        table.add_row(name, text)
    console = Console(highlight=False, width=None if Console().is_terminal else 160)
    console.print(table)
    console.print("ok")


@app.command()
def show(words: Words) -> None:
    """Print the resolved configuration, defaults included, as YAML."""
    typer.echo(dump_yaml(load_config(*split_words(words))), nl=False)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a complete configuration, for editors."""
    typer.echo(json.dumps(json_schema(), indent=2))


def _summary(config: RunConfig, layout: ParallelLayout | None) -> list[tuple[str, str]]:
    """Rows of what follows from the config: (name, text)."""
    optimizer = config.optimizer
    return [
        ("run", f"{config.run.name} in {config.run.dir}  (fingerprint {fingerprint(config)[:12]})"),
        ("model", _model_line(config.model)),
        ("experts", _moe_line(config.model)),
        *([("dispatch", _dispatch_line(config, config.model.moe))] if config.model.moe else []),
        ("parameters", _parameters_line(config.model)),
        ("training", _training_line(config)),
        (
            "optimizer",
            f"{optimizer.type}, lr {optimizer.lr:g} ({optimizer.schedule.type}), ZeRO stage {config.zero.stage}",
        ),
        ("checkpoint", _checkpoint_line(config)),
        ("layout", _layout_line(config, layout)),
    ]


def _parameters_line(model: ModelConfig) -> str:
    count = parameter_count(model)
    parts = {name: getattr(count, name) for name in ("embedding", "attention", "mlp", "expert", "hyper")}
    split = ", ".join(f"{name} {_short(number)}" for name, number in parts.items() if number)
    return f"{_short(count.total)} total, {_short(count.active_per_token)} active per token: {split}"


def _training_line(config: RunConfig) -> str:
    train, model = config.training, config.model
    step = train.global_batch_size * model.seq_length
    flops = flops_per_token(model)
    return (
        f"{train.train_iters} steps x {train.global_batch_size} sequences x {model.seq_length} tokens = "
        f"{_short(train.train_iters * step)} tokens, {train.precision}; {_short(flops)}FLOP per token, "
        f"{_short(flops * step)}FLOP per step"
    )


def _checkpoint_line(config: RunConfig) -> str:
    settings, nbytes = config.checkpoint, 12 * parameter_count(config.model).total
    when = f"every {settings.save_interval} steps" if settings.save_interval else "at the end"
    how = "beside training, with as much host memory over all ranks" if settings.async_save else "training waits"
    return f"{_short(nbytes)}B (weights and Adam's moments in fp32) {when}; {how}"


def _layout_line(config: RunConfig, layout: ParallelLayout | None) -> str:
    train, par = config.training, config.parallel
    if layout is None:
        return (
            f"tensor {par.tensor} x pipeline {par.pipeline}, expert {par.expert}: a multiple of {smallest_world(par)} "
            "ranks (--world-size N checks one)"
        )
    micro = layout.micro_batches(train.global_batch_size, train.micro_batch_size)
    return f"{layout.describe()}; {micro} micro-batches of {train.micro_batch_size} per step and data-parallel rank"


def _model_line(model: ModelConfig) -> str:
    latent = model.multi_latent_attention
    attention = f"in {model.kv_heads} query groups" if latent is None else f"from latents of {latent.kv_lora_rank}"
    return (
        f"{model.num_layers} layers, hidden {model.hidden_size}, {model.num_attention_heads} heads {attention}, "
        f"vocabulary {model.vocab_size}"
    )


def _moe_line(model: ModelConfig) -> str:
    moe = model.moe
    if moe is None:
        return "none: every layer is dense"
    choice = moe.router.describe(moe.num_choices)
    kind = "static branch" if moe.hyper is not None and moe.hyper.condition_on == "static" else "hypernetwork expert"
    hyper = f"; {kind} of {moe.hyper.bottleneck}" if moe.hyper is not None else ""
    more = [name.removeprefix("model.moe.") for name in relatives_used(model)]
    beside = f"; {', '.join(more)}" if more else ""
    return f"{moe.num_experts} of {moe.ffn_hidden_size}, {choice} per token{hyper}{beside}"


def _dispatch_line(config: RunConfig, moe: MoEConfig) -> str:
    par, train = config.parallel, config.training
    padded_rows = _padded_rows(config, moe)
    bound = dispatch_bound(
        tokens=train.micro_batch_size * config.model.seq_length // par.tensor,
        max_k=moe.selectable[-1],
        num_experts_local=moe.num_experts // par.expert,
        hidden=config.model.hidden_size,
        ffn=moe.ffn_hidden_size if padded_rows is not None else max(moe.expert_widths or [moe.ffn_hidden_size]),
        precision=train.precision,
        max_rows=moe.dispatch.max_rows,
        expert_ranks=par.expert,
        overlap=moe.dispatch.overlap,
        padded_rows=padded_rows,
        diverse_width=None if moe.expert_widths is None else moe.num_experts // par.expert * moe.ffn_hidden_size,
        gated=config.model.activation == "swiglu",
    )
    kept = "recomputed" if config.model.recompute == "full" else f"{_short(bound.kept)}B kept for the backward"
    rows = f"{moe.dispatch.max_rows} rows at once" if moe.dispatch.max_rows else "any number of rows at once"
    return f"{rows}: at most {_short(bound.total)}B in a layer, whatever the router does; {kept}"


def _padded_rows(config: RunConfig, moe: MoEConfig) -> int | None:
    """Rows that a rank sends to each expert when they are padded to the capacity."""
    limits = capacities(moe, config.model.seq_length)
    if moe.capacity is None or limits is None or not moe.capacity.pad:
        return None
    return config.training.micro_batch_size * min(
        max(limits[: moe.num_experts]), config.model.seq_length // config.parallel.tensor
    )


def _short(number: float) -> str:
    """1234567 -> `1.23M`."""
    for scale, suffix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.3g}{suffix}"
    return f"{number:.3g}"
