"""Which charts a run's metrics give, and the numbers that each draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from moetrain.config.moe import MoEConfig
from moetrain.report.metrics_table import Frames, MetricsTable, Series
from moetrain.report.thinning import MAX_CELLS, columns, columns_for, pack_ratios, pack_shares, thin

MAX_CHART_POINTS = 8000
_LOG_FROM = 50.0  # a chart whose largest value is so many times its smallest is drawn on a logarithmic scale


@dataclass(frozen=True)
class Line:
    """`role` decides the color: "first", "second", "reference" (a dashed level) or "layer"."""

    label: str
    role: Literal["first", "second", "reference", "layer"]
    series: Series


@dataclass(frozen=True)
class LineChart:
    """Lines over steps."""

    key: str
    title: str
    unit: str
    lines: tuple[Line, ...]
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """At most `MAX_CHART_POINTS` points over all lines."""
        lines = [line for line in self.lines if len(line.series.steps)]
        most = max(60, min(500, MAX_CHART_POINTS // max(1, len(lines))))
        lines = [replace(line, series=thin(line.series, most)) for line in lines]
        return {
            "key": self.key,
            "unit": self.unit,
            "log": _spans_magnitudes([line.series.values for line in lines]),
            "lines": [
                {
                    "label": line.label,
                    "role": line.role,
                    "steps": line.series.steps.tolist(),
                    "values": [rounded(value) for value in line.series.values.tolist()],
                }
                for line in lines
            ],
        }


@dataclass(frozen=True)
class HeatChart:
    """One layer over steps. `scale`: "ratio" (to the mean) or "share"; row 0 is called `first_row`."""

    key: str
    layer: int
    row_name: str
    first_row: int
    scale: Literal["ratio", "share"]
    spans: list[tuple[int, int]]
    rows: int
    cells: str
    note: str

    def as_json(self) -> dict[str, Any]:
        """`cells`: one byte a cell, columns one after another."""
        return {
            "key": self.key,
            "rowName": self.row_name,
            "firstRow": self.first_row,
            "scale": self.scale,
            "spans": self.spans,
            "rows": self.rows,
            "cells": self.cells,
        }


def training_charts(table: MetricsTable) -> list[LineChart]:
    """Loss, gradient norm, learning rate, pace, auxiliary losses."""
    held_out, unigram = table.series("eval/loss", "eval"), table.series("eval/unigram_entropy", "eval")
    loss = [Line("training", "first", table.series("train/loss")), Line("held-out", "second", held_out)]
    if unigram.last is not None:
        loss.append(Line("unigram entropy", "reference", _level(table, unigram.last)))
    charts = [
        LineChart(
            "loss",
            "Loss",
            "nats per token",
            tuple(loss),
            "A model above the unigram entropy has learned nothing from context." if unigram.last else "",
        ),
        _single(table, "grad-norm", "Gradient norm", "", "train/grad_norm", "Before clipping."),
        _single(table, "lr", "Learning rate", "", "train/lr"),
        _single(table, "tokens-per-second", "Throughput", "tokens per second", "perf/tokens_per_second", "All ranks."),
        _single(
            table,
            "load-balance",
            "Load-balancing loss",
            "",
            "train/load_balance",
            "Mean of the layers, before its coefficient; 1 at uniform probabilities.",
        ),
        _single(table, "z-loss", "Router z-loss", "", "train/z_loss", "Mean of the layers, before its coefficient."),
    ]
    return [chart for chart in charts if any(len(line.series.steps) for line in chart.lines)]


def load_charts(table: MetricsTable) -> list[LineChart]:
    """Imbalance of each layer."""
    busiest = _by_layer(table, "max_over_mean")
    even = []
    for layer in table.layers:
        entropy, most = table.layer_series(layer, "entropy"), table.layer_series(layer, "max_entropy")
        if len(entropy.steps) and len(entropy.steps) == len(most.steps):
            share = np.divide(entropy.values, most.values, out=np.ones_like(most.values), where=most.values > 0)
            even.append(Line(f"layer {layer}", "layer", Series(entropy.steps, share)))
    charts = [
        LineChart("max-over-mean", "Busiest expert", "× mean load", busiest, "1 is perfect balance."),
        LineChart(
            "load-entropy", "Entropy of the load", "share of the largest possible", tuple(even), "1 is perfect balance."
        ),
    ]
    return [chart for chart in charts if chart.lines]


def k_charts(table: MetricsTable, moe: MoEConfig | None) -> list[LineChart]:
    """Experts per token against the budget, and the state of what holds it there."""
    lines = _by_layer(table, "mean_k")
    budget = mean_k_budget(moe) if moe else None
    if lines and budget is not None:
        lines = (*lines, Line("budget", "reference", _level(table, budget)))
    charts = [
        LineChart("mean-k", "Mean experts per token", "experts", lines),
        LineChart(
            "threshold",
            "Importance at the middle threshold",
            "",
            _by_layer(table, "threshold"),
            "A token gets one more expert for each threshold that its importance reaches; thresholds are running "
            "quantiles that keep the mean K at the budget.",
        ),
    ]
    return [chart for chart in charts if chart.lines]


def hyper_charts(table: MetricsTable) -> list[LineChart]:
    """How large the generated expert's output is."""
    lines = _by_layer(table, "hyper_norm_ratio")
    note = "Root mean square of the generated expert's output over that of the selected experts' output."
    return [LineChart("hyper-norm-ratio", "Hyper-expert against experts", "ratio of norms", lines, note)] * bool(lines)


def load_heatmaps(table: MetricsTable) -> list[HeatChart]:
    """Load of each expert relative to the mean of its layer."""
    return [
        HeatChart(
            key=f"load-{layer}",
            layer=layer,
            row_name="expert",
            first_row=0,
            scale="ratio",
            spans=spans,
            rows=means.shape[1],
            cells=pack_ratios(means * means.shape[1]),
            note=_extremes(means[-1] * means.shape[1]),
        )
        for layer, (spans, means) in _frames(table, "load", MAX_CELLS)
    ]


def k_heatmaps(table: MetricsTable) -> list[HeatChart]:
    """Share of the tokens with each K; nothing where every token gets the same number."""
    charts = []
    for layer, (spans, means) in _frames(table, "k_histogram", MAX_CELLS // 4):
        used = np.flatnonzero(means.any(axis=0))
        if not len(used):
            continue
        shares = means / np.maximum(means.sum(axis=1, keepdims=True), 1e-30)
        low, high = int(used[0]), int(used[-1])
        charts.append(
            HeatChart(
                key=f"k-{layer}",
                layer=layer,
                row_name="K",
                first_row=low,
                scale="share",
                spans=spans,
                rows=high - low + 1,
                cells=pack_shares(shares[:, low : high + 1]),
                note=f"K {low} to {high}",
            )
        )
    return charts if any(chart.rows > 1 for chart in charts) else []


def mean_k_budget(moe: MoEConfig) -> float | None:
    """The mean number of experts per token that the settings ask for; None where they leave it open."""
    known = len(moe.selectable) == 1 or moe.expected_mean_k < moe.max_top_k
    return moe.expected_mean_k if known else None


def rounded(value: float, digits: int = 5) -> float | None:
    """So many significant digits; None for what JSON has no number for."""
    return float(f"{value:.{digits}g}") if np.isfinite(value) else None


def _frames(
    table: MetricsTable, name: str, cells: int
) -> Iterator[tuple[int, tuple[list[tuple[int, int]], np.ndarray]]]:
    """(layer, columns) of all layers that have such lists, all together of at most about so many cells."""
    found: list[tuple[int, Frames]] = []
    for layer in table.layers:
        frames = table.layer_frames(layer, name)
        if frames is not None:
            found.append((layer, frames))
    for layer, frames in found:
        yield layer, columns(frames, columns_for(len(found), frames.values.shape[1], cells))


def _extremes(ratios: np.ndarray) -> str:
    high, low = int(ratios.argmax()), int(ratios.argmin())
    return f"now: {high} at {ratios[high]:.2f}×, {low} at {ratios[low]:.2f}×"


def _single(table: MetricsTable, key: str, title: str, unit: str, name: str, note: str = "") -> LineChart:
    return LineChart(key, title, unit, (Line(title.lower(), "first", table.series(name)),), note)


def _by_layer(table: MetricsTable, name: str) -> tuple[Line, ...]:
    lines = (Line(f"layer {layer}", "layer", table.layer_series(layer, name)) for layer in table.layers)
    return tuple(line for line in lines if len(line.series.steps))


def _level(table: MetricsTable, value: float) -> Series:
    return Series(np.array([table.rows[0].iteration, table.last_step]), np.array([value, value]))


def _spans_magnitudes(values: Sequence[np.ndarray]) -> bool:
    everything = np.concatenate(values) if values else np.zeros(0)
    everything = everything[np.isfinite(everything)]
    return bool(len(everything) and everything.min() > 0 and everything.max() > _LOG_FROM * everything.min())
