"""The figures and words at the top of the page."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from moetrain.config.layout import ParallelLayout
from moetrain.config.model import ModelConfig
from moetrain.config.schema import RunConfig
from moetrain.config.size import parameter_count
from moetrain.errors import LayoutError
from moetrain.report.charts import mean_k_budget
from moetrain.report.metrics_table import MetricsTable
from moetrain.report.run_folder import RunFolder


@dataclass(frozen=True)
class Tile:
    """A figure, what it is, and what to hold it against."""

    label: str
    value: str
    note: str = ""


def tiles(run: RunFolder) -> list[Tile]:
    """Where the run stands now."""
    return [tile for tile in (*_progress_tiles(run), *_routing_tiles(run)) if tile.value]


def details(run: RunFolder, world_size: int | None) -> list[tuple[str, str]]:
    """(name, text) lines about the run. `world_size` is that of a checkpoint, for a run that has not ended."""
    config = run.config
    summary = run.summary or {}
    size = summary.get("world_size", world_size)
    lines = [
        ("model", describe_model(config.model)),
        ("router", describe_router(config.model)),
        ("layout", describe_layout(config, size if isinstance(size, int) else None)),
        ("batch", f"{config.training.global_batch_size:,} sequences of {config.model.seq_length:,} tokens"),
        ("precision", config.training.precision),
        ("status", describe_status(run)),
    ]
    if run.table.damaged:
        lines.append(("metrics", f"{run.table.damaged} damaged line(s) of metrics.jsonl are not shown"))
    return [(name, text) for name, text in lines if text]


def describe_model(model: ModelConfig) -> str:
    """`HyperMoE + DA-MoE decoder: 4 layers of width 128, 8 experts in 4 of them; 7.6M parameters, ...`."""
    count = parameter_count(model)
    text = f"{_kind(model)} {model.type}: {model.num_layers} layers of width {model.hidden_size:,}"
    if model.moe is None:
        return f"{text}; {short(count.total)} parameters"
    layers = sum(model.is_moe_layer(i) for i in range(model.num_layers))
    text += f", {model.moe.num_experts} experts in {'each' if layers == model.num_layers else f'{layers} of them'}"
    bound = "at most " if mean_k_budget(model.moe) is None else ""
    return f"{text}; {short(count.total)} parameters, {bound}{short(count.active_per_token)} active per token"


def describe_router(model: ModelConfig) -> str:
    """The setting that decides how many experts a token gets; "" for a dense model."""
    if model.moe is None:
        return ""
    return f"{model.moe.router.type}: {model.moe.router.describe(model.moe.num_choices)}"


def describe_layout(config: RunConfig, world_size: int | None) -> str:
    """Ranks by dimension where their number is known, else the dimensions that the settings name."""
    parallel, words = config.parallel, f"; ZeRO-{config.zero.stage}"
    if parallel.sequence:
        words = "; sequence parallelism" + words
    if world_size is not None:
        try:
            sizes = (world_size, parallel.tensor, parallel.pipeline, parallel.expert, parallel.virtual_pipeline)
            return ParallelLayout(*sizes).describe() + words
        except LayoutError:  # the settings are those of a later process, on another number of ranks
            pass
    return f"tensor {parallel.tensor} x pipeline {parallel.pipeline}, expert {parallel.expert}{words}"


def describe_status(run: RunFolder) -> str:
    """How the newest process ended, or that it has not said."""
    goal = run.config.training.train_iters
    written = f"metrics written {moment(run.written)}"
    if run.summary is None:
        return f"running, or killed: step {run.table.last_step:,} of {goal:,}; {written}"
    outcome = str(run.summary.get("outcome", "ended"))
    error = f" ({run.summary['error']})" if run.summary.get("error") else ""
    return f"{outcome}{error} at step {run.summary['iteration']:,} of {goal:,}; {written}"


def moment(when: datetime) -> str:
    """Minutes are enough for people; the zone is always UTC."""
    return when.strftime("%Y-%m-%d %H:%M UTC")


def short(value: float) -> str:
    """Three digits and a letter: 412k, 1.05M, 31.4B."""
    for power, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * power:
            return f"{value / power:.3g}{letter}"
    return f"{value:.3g}"


def _kind(model: ModelConfig) -> str:
    if model.moe is None:
        return "dense"
    names = ["HyperMoE"] * (model.moe.hyper is not None)
    names += ["DA-MoE"] * (model.moe.router.type == "da_moe")
    return " + ".join(names) or "mixture-of-experts"


def _progress_tiles(run: RunFolder) -> Iterator[Tile]:
    table, goal = run.table, run.config.training.train_iters
    loss = table.series("train/loss").last
    yield Tile("training loss", _nats(loss), f"step {table.last_step:,} of {goal:,}")
    held_out, unigram = table.series("eval/loss", "eval"), table.series("eval/unigram_entropy", "eval").last
    if held_out.last is not None:
        yield Tile("held-out loss", _nats(held_out.last), _against(held_out.last, unigram, int(held_out.steps[-1])))
    tokens = table.series("train/consumed_tokens").last
    yield Tile("tokens seen", short(tokens) if tokens else "", "since the run began")
    pace, mfu = table.series("perf/tokens_per_second").last, table.series("perf/mfu").last
    yield Tile("tokens per second", short(pace) if pace else "", f"{mfu:.1%} of peak FLOP/s" if mfu else "")


def _against(loss: float, unigram: float | None, step: int) -> str:
    if unigram is None:
        return f"step {step:,}"
    return f"{abs(unigram - loss):.2f} {'below' if loss < unigram else 'above'} unigram entropy, step {step:,}"


def _routing_tiles(run: RunFolder) -> Iterator[Tile]:
    table, moe = run.table, run.config.model.moe
    mean_k = _last_of_layers(table, "mean_k")
    if mean_k:
        budget = mean_k_budget(moe) if moe else None
        note = f"budget {budget:g}; " if budget is not None else ""
        note += f"layers {min(mean_k.values()):.2f} to {max(mean_k.values()):.2f}"
        yield Tile("experts per token", f"{sum(mean_k.values()) / len(mean_k):.2f}", note)
    busiest = _last_of_layers(table, "max_over_mean")
    if busiest:
        worst = max(busiest, key=lambda layer: busiest[layer])
        yield Tile("busiest expert", f"{busiest[worst]:.2f}×", f"the mean load; layer {worst}")
    ratios = _last_of_layers(table, "hyper_norm_ratio")
    if ratios:
        note = f"of the experts' norm; layers {min(ratios.values()):.2f} to {max(ratios.values()):.2f}"
        yield Tile("hyper-expert", f"{sum(ratios.values()) / len(ratios):.2f}×", note)


def _last_of_layers(table: MetricsTable, name: str) -> dict[int, float]:
    found: dict[int, Any] = {layer: table.layer_series(layer, name).last for layer in table.layers}
    return {layer: value for layer, value in found.items() if value is not None and math.isfinite(value)}


def _nats(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if math.isfinite(value) else f"{value}"
