"""The benchmarks: name, what it is compared with, at which sizes, and the function that builds it. No torch.

The function is named and not imported, so that the command line can list and check names without importing torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from moetrain.bench.results import Point
from moetrain.bench.settings import Settings

_HEADS, _HEAD_DIM = 8, 64  # the attention that is measured: as much work a token as a hidden size of 512 has


@dataclass(frozen=True)
class Benchmark:
    """A row of the catalog.

    title: a line for tables. points: the sizes to measure. builder: "module:function" from a Point to a Problem.
    shows: "speedup", the baseline's time over ours; or "cost", ours over the baseline's, where that does less.
    """

    title: str
    points: Callable[[Settings], Iterator[Point]]
    builder: str
    shows: Literal["speedup", "cost"] = "speedup"


def gemm_points(settings: Settings) -> Iterator[Point]:
    """Every dtype, number of experts, width and routing."""
    axes = product(settings.dtypes, settings.experts, settings.ffn, settings.routing)
    for dtype, experts, ffn, routing in axes:
        yield Point(
            settings.device, dtype, settings.tokens, settings.hidden, experts, ffn, settings.top_k, routing=routing
        )


def row_points(settings: Settings) -> Iterator[Point]:
    """What moves rows does not know the experts' width."""
    narrow = replace(settings, ffn=settings.ffn[:1])
    for point in gemm_points(narrow):
        yield replace(point, ffn=0)


def plan_points(settings: Settings) -> Iterator[Point]:
    """What sorts expert numbers does not know the rows."""
    for point in row_points(replace(settings, dtypes=("int64",))):
        yield replace(point, hidden=0)


def attention_points(measures: tuple[str, ...], causal: bool) -> Callable[[Settings], Iterator[Point]]:
    """One sequence, the given measures."""

    def points(settings: Settings) -> Iterator[Point]:
        for dtype, measure in product(settings.dtypes, measures):
            yield Point(settings.device, dtype, settings.seq, _HEAD_DIM, heads=_HEADS, measure=measure, causal=causal)

    return points


def hyper_points(settings: Settings) -> Iterator[Point]:
    """The paper's shape: eight experts, of which a token selects one."""
    for dtype in settings.dtypes:
        yield Point(
            settings.device, dtype, settings.tokens, settings.hyper_hidden, 8, settings.hyper_ffn, 1, "balanced"
        )


BENCHMARKS: dict[str, Benchmark] = {
    "fprop": Benchmark(
        "Grouped product, forward: rows [R, D] by expert weights [E, F, D]", gemm_points, "moetrain.bench.gemm:fprop"
    ),
    "gathered_fprop": Benchmark(
        "Grouped product that gathers its rows, against a gather and a product",
        gemm_points,
        "moetrain.bench.gemm:gathered_fprop",
    ),
    "dgrad": Benchmark("Grouped product, gradient of the rows", gemm_points, "moetrain.bench.gemm:dgrad"),
    "wgrad": Benchmark("Grouped product, gradient of the weights", gemm_points, "moetrain.bench.gemm:wgrad"),
    "wgrad_out": Benchmark(
        "Gradient of the weights into a kept buffer, against baselines that allocate theirs",
        gemm_points,
        "moetrain.bench.gemm:wgrad_out",
    ),
    "layer_forward": Benchmark(
        "Expert layer without gradients: expert numbers to tokens (plan, gather, fc1, SwiGLU, fc2, weighted sum)",
        gemm_points,
        "moetrain.bench.layer:forward",
    ),
    "layer": Benchmark(
        "Expert layer, forward and backward: gradients of tokens, routing weights, fc1 and fc2",
        gemm_points,
        "moetrain.bench.layer:forward_backward",
    ),
    "plan": Benchmark("Sorting slots by expert", plan_points, "moetrain.bench.rows:plan"),
    "permute": Benchmark("Tokens to rows sorted by expert", row_points, "moetrain.bench.rows:permute"),
    "combine": Benchmark("Weighted sum of the rows of each token", row_points, "moetrain.bench.rows:combine"),
    "attention_rows": Benchmark(
        "Attention with a row statistic of its probabilities; cost over attention alone",
        attention_points(("self_weight", "row_max", "row_entropy"), causal=True),
        "moetrain.bench.attention:row_measure",
        shows="cost",
    ),
    "attention_columns": Benchmark(
        "Attention with a column statistic of its probabilities",
        attention_points(("col_sum", "col_max"), causal=False),
        "moetrain.bench.attention:column_measure",
    ),
    "hyper": Benchmark(
        "HyperMoE's generated expert (r = 64, h = 128), forward and backward; share of the expert layer's time",
        hyper_points,
        "moetrain.bench.hyper:hyper",
        shows="cost",
    ),
}


def chosen(settings: Settings) -> dict[str, Benchmark]:
    """The benchmarks of `settings.only`, in the catalog's order."""
    return {name: b for name, b in BENCHMARKS.items() if not settings.only or name in settings.only}


def count_points(settings: Settings) -> int:
    """Over all processes."""
    return len(settings.threads) * sum(len(list(b.points(settings))) for b in chosen(settings).values())
