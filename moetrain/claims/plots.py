"""The pictures of a report, as SVG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from moetrain.claims.counts import Counts
from moetrain.claims.findings import Finding
from moetrain.claims.intervals import NOISE
from moetrain.claims.lab import Results
from moetrain.claims.study import Study

_COLOR = {"supported": "#1b7f4d", "refuted": "#b3261e", "not shown": "#6b6b6b", "observed": "#2a5db0"}
_ROW_INCHES = 0.3


def forest(findings: Sequence[Finding], path: Path) -> None:
    """Every comparison's difference of held-out losses with its interval, below its claim's name."""
    rows = [(finding.claim.name, compared) for finding in findings for compared in finding.compared]
    figure, axes = plt.subplots(figsize=(9, 1.2 + _ROW_INCHES * len(rows)), layout="constrained")
    axes.axvspan(-NOISE, NOISE, color="#000000", alpha=0.06, linewidth=0)
    axes.axvline(0, color="#000000", linewidth=0.8)
    for at, (_, compared) in enumerate(rows):
        d, color = compared.difference, _COLOR[compared.verdict]
        axes.plot([d.low, d.high], [at, at], color=color, linewidth=2, solid_capstyle="butt")
        axes.plot([d.mean], [at], "o", color=color, markersize=5)
    axes.set_yticks(range(len(rows)), [f"{name}  {c.comparison.why}" for name, c in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("held-out loss, arm minus baseline, nats per token\n(left of zero the arm is better)")
    _finish(figure, path)


def losses(study: Study, results: Results, path: Path) -> None:
    """Every run's held-out loss, a line of dots for each arm, the mean as a bar."""
    arms = [arm for arm in study.arms if arm.name in results]
    figure, axes = plt.subplots(figsize=(9, 1.0 + _ROW_INCHES * len(arms)), layout="constrained")
    for at, arm in enumerate(arms):
        values = [run.loss for run in results[arm.name]]
        axes.plot(values, [at] * len(values), "o", color="#2a5db0", alpha=0.55, markersize=5, markeredgewidth=0)
        axes.plot([sum(values) / len(values)] * 2, [at - 0.3, at + 0.3], color="#000000", linewidth=1.5)
    axes.set_yticks(range(len(arms)), [arm.name for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xlabel("held-out loss, nats per token: every seed, and the mean")
    axes.grid(axis="x", linewidth=0.4, alpha=0.5)
    _finish(figure, path)


def curves(study: Study, results: Results, names: Sequence[str], path: Path) -> None:
    """Training loss over steps of some arms, averaged over seeds and smoothed over a twentieth of the run."""
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    for name in names:
        runs = results[name]
        steps = [step for step, _ in runs[0].curve]
        mean = [sum(run.curve[i][1] for run in runs) / len(runs) for i in range(len(steps))]
        axes.plot(steps, _smooth(mean, max(1, len(mean) // 20)), linewidth=1.2, label=study.arm(name).title)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats per token")
    axes.grid(linewidth=0.4, alpha=0.5)
    axes.legend(fontsize="small")
    _finish(figure, path)


def counts(by_arm: Mapping[str, Counts], path: Path) -> None:
    """Mean K by position (powers of two), and the loss of the predictions made where a token got K experts."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for number, (arm, c) in enumerate(by_arm.items()):
        # Ten colors are told apart; then the same with another line.
        look = {"color": f"C{number % 10}", "linestyle": ("-", "--")[number // 10 % 2], "linewidth": 1.3}
        left.plot([low + 1 for low in c.by_position], list(c.by_position.values()), label=arm, **look)
        right.plot(list(c.by_k), [loss for _, loss in c.by_k.values()], marker=".", **look)
    left.set_xscale("log", base=2)
    left.set_xlabel("position, counted from 1")
    left.set_ylabel("mean K")
    right.set_xlabel("K")
    right.set_ylabel("loss of the prediction made there, nats")
    for axes in (left, right):
        axes.grid(linewidth=0.4, alpha=0.5)
    figure.legend(loc="outside right center", fontsize="small")
    _finish(figure, path)


def _smooth(values: Sequence[float], width: int) -> list[float]:
    """Mean of the `width` values up to each."""
    windows = (values[max(0, i - width + 1) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _finish(figure: Figure, path: Path) -> None:
    # No date and a fixed salt for ids: the same results give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "moetrain"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
