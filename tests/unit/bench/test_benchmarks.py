"""Every benchmark of the catalog at small sizes: it builds, and all that it compares agrees."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from moetrain import ops
from moetrain.bench.catalog import BENCHMARKS, chosen, count_points
from moetrain.bench.experts import Routed, expert_ids
from moetrain.bench.layer import BASELINES
from moetrain.bench.measure import clock_for, measure
from moetrain.bench.problem import Missing, NotHereError, load
from moetrain.bench.results import CaseResult, Point
from moetrain.bench.settings import DTYPES, ROUTINGS, Settings, default_settings

SMALL = Settings(
    device="cpu",
    threads=(1,),
    dtypes=DTYPES,
    experts=(4,),
    ffn=(24,),
    hidden=16,
    tokens=32,
    top_k=2,
    routing=ROUTINGS,
    seq=40,
    hyper_hidden=32,
    hyper_ffn=48,
)
ATTENTION = ("attention_rows", "attention_columns")
POINTS = [
    pytest.param(name, point, id=f"{name} {point.label()}")
    for name, benchmark in BENCHMARKS.items()
    for point in benchmark.points(SMALL)
    if name not in ATTENTION
]


def compare(name: str, point: Point) -> CaseResult:
    """DisagreementError when a baseline is not ours."""
    problem = load(BENCHMARKS[name].builder)(point)
    return measure(name, point, 1, problem, clock_for("cpu", 1), budget=0.0)


@pytest.mark.parametrize(("name", "point"), POINTS)
def test_all_that_a_benchmark_compares_agrees(name: str, point: Point) -> None:
    result = compare(name, point)
    assert result.baselines and result.work > 0
    unexpected = {
        who: why for who, why in result.missing.items() if "distinct experts" not in why and "tutel" not in why
    }
    assert unexpected == {}, "a baseline that no longer runs would be missing from the tables without anybody noticing"


@pytest.mark.parametrize("top_k", [1, 3])
def test_layers_agree_for_other_numbers_of_experts_per_token(top_k: int) -> None:
    result = compare("layer", Point("cpu", "fp32", 32, 16, 5, 24, top_k, "zipf"))
    assert set(result.baselines) == set(BASELINES) - {"DeepSpeed MoE, Tutel"}


def with_importance(
    q: Tensor, k: Tensor, v: Tensor, measure: str, causal: bool, scale: float, valid_BS: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The operator's meaning, by the whole matrix."""
    scores = torch.einsum("ibhd,jbhd->bhij", q.float(), k.float()) * scale
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    p = scores.softmax(-1)
    importance = {
        "col_sum": p.sum(-2),
        "col_max": p.amax(-2),
        "self_weight": p.diagonal(dim1=-2, dim2=-1),
        "row_max": p.amax(-1),
        "row_entropy": -torch.xlogy(p, p).sum(-1),
    }[measure]
    return torch.einsum("bhij,jbhd->ibhd", p, v.float()).to(q.dtype), importance.sum(1).t()


@pytest.mark.parametrize(
    ("name", "point"),
    [pytest.param(n, p, id=f"{n} {p.label()}") for n in ATTENTION for p in BENCHMARKS[n].points(SMALL)],
)
def test_attention_baselines_are_given_the_same_problem(
    name: str, point: Point, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "attention_with_importance", with_importance, raising=False)
    assert not compare(name, point).missing


@pytest.mark.parametrize("name", ATTENTION)
def test_without_the_operator_attention_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ops, "attention_with_importance", raising=False)
    with pytest.raises(NotHereError, match="has no attention_with_importance"):
        compare(name, next(BENCHMARKS[name].points(SMALL)))


# --- routing --------------------------------------------------------------------------------------------------------


def loads(routing: str, experts: int) -> Tensor:
    torch.manual_seed(0)
    ids = expert_ids(512, 2, experts, routing, "cpu")
    if routing != "all_to_one":
        assert bool((ids[:, 0] != ids[:, 1]).all()), "a token's experts are distinct"
    return torch.bincount(ids.reshape(-1), minlength=experts)


def test_balanced_routing_gives_every_expert_as_many_rows() -> None:
    assert loads("balanced", 16).tolist() == [64] * 16


def test_zipf_routing_is_skewed_towards_the_first_experts() -> None:
    counts = loads("zipf", 16)
    assert counts[0] > 2.5 * counts.float().mean() and counts[0] > counts[3] > counts[15]


def test_all_to_one_means_one() -> None:
    assert loads("all_to_one", 16).tolist() == [1024] + [0] * 15


def test_padding_that_would_fill_the_memory_is_refused_and_listed() -> None:
    point = Point("cpu", "fp32", 64, 8, 16, 8, 2, "all_to_one")
    with pytest.raises(NotHereError, match="would pad 128 rows to 2048, more than 8 times as many"):
        _ = Routed(point).padded_rows
    problem = load(BENCHMARKS["fprop"].builder)(point)
    assert isinstance(problem.baselines["padded bmm"], Missing)


def test_padded_rows_come_back_where_they_were() -> None:
    routed = Routed(Point("cpu", "fp32", 32, 8, 4, 8, 2, "zipf"))
    rows = routed.random(routed.rows, 3)
    padded = routed.pad(rows)
    assert padded.shape == (4, int(routed.counts_E.max()), 3)
    assert torch.equal(routed.unpad(padded), rows)
    assert padded.count_nonzero() == rows.count_nonzero()


# --- catalog --------------------------------------------------------------------------------------------------------


def test_every_operator_that_computes_is_in_a_benchmark() -> None:
    """A new operator needs a row in the catalog, or a reason here."""
    elsewhere = {
        "all_to_all": "needs several processes",
        "extension_info": "computes nothing",
        "generated_experts": "inside HyperExperts, which is measured",
        "reorder_by_expert": "counts alone",
        "row_invariant_linear": "grouped_gemm of one group",
        "start_all_to_all": "needs several processes",
        "unpermute": "combine with weights of one",
        "weights_importance": "sums of a matrix that is there anyway, for scores with a bias",
    }
    modules = {benchmark.builder.partition(":")[0] for benchmark in BENCHMARKS.values()}
    text = "".join(inspect.getsource(__import__(module, fromlist=["_"])) for module in modules)
    functions = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    assert {name for name in functions if name not in text} <= set(elsewhere)


def test_the_number_of_points_is_told_before_the_first_is_measured() -> None:
    settings = default_settings("cpu", cores=2)
    named = {name: len(list(benchmark.points(settings))) for name, benchmark in chosen(settings).items()}
    assert named["fprop"] == 2 * 3 * 2 * 3 and named["permute"] == 2 * 3 * 3 and named["plan"] == 3 * 3
    assert count_points(settings) == 2 * sum(named.values())
