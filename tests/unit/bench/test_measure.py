"""Turns, rounds, repeats, and what becomes of a baseline that fails, differs or is far slower."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moetrain.bench.agreement import TOLERANCES, DisagreementError, check_agreement, row_error
from moetrain.bench.measure import MAX_ROUNDS, MIN_ROUNDS, alternate, clock_for, measure
from moetrain.bench.problem import Contender, Missing, NotHereError, Problem, attempt, load
from moetrain.bench.results import Point

POINT = Point("cpu", "fp32", 4, 8)


class Diary:
    """A clock of its own: each contender takes the time that it is said to take, and every call is written down."""

    def __init__(self, **seconds: float) -> None:
        self.seconds, self.now, self.calls = seconds, 0.0, []

    def contender(self, who: str, value: float = 1.0) -> Contender:
        def call() -> torch.Tensor:
            self.calls.append(who)
            self.now += self.seconds[who]
            return torch.full((4, 8), value)

        return Contender(call)

    def clock(self, call: Callable[[], Any]) -> tuple[Any, float]:
        start = self.now
        return call(), self.now - start


def run(diary: Diary, problem: Problem, budget: float = 0.0):
    return measure("some", POINT, 1, problem, diary.clock, budget)


def test_ours_and_the_baselines_take_turns() -> None:
    diary = Diary(ours=1.0, a=2.0, b=3.0)
    result = run(diary, Problem(diary.contender("ours"), {w: diary.contender(w) for w in "ab"}, work=1.0))
    assert diary.calls == ["ours", "a", "b"] * (1 + MIN_ROUNDS)  # the first of them is not timed
    assert result.ours == pytest.approx([1.0] * MIN_ROUNDS)
    assert result.baselines == {"a": pytest.approx([2.0] * MIN_ROUNDS), "b": pytest.approx([3.0] * MIN_ROUNDS)}


def test_a_far_slower_baseline_is_in_the_first_rounds_only() -> None:
    diary = Diary(ours=1.0, near=9.9, far=10.1)
    names = ("near", "far")
    problem = Problem(diary.contender("ours"), {w: diary.contender(w) for w in names}, work=1.0)
    result = run(diary, problem, budget=60.0)
    assert {who: len(times) for who, times in result.baselines.items()} == {"near": MAX_ROUNDS, "far": MIN_ROUNDS}


def test_a_baseline_that_takes_no_time_to_speak_of_is_in_every_round_however_slow() -> None:
    diary = Diary(ours=1e-3, far=5e-2)
    problem = Problem(diary.contender("ours"), {"far": diary.contender("far")}, work=1.0)
    assert len(run(diary, problem, budget=60.0).baselines["far"]) == MAX_ROUNDS


def test_a_short_call_is_repeated_and_reported_per_call() -> None:
    diary = Diary(ours=1e-4, a=3e-4)
    result = run(diary, Problem(diary.contender("ours"), {"a": diary.contender("a")}, work=1.0))
    assert result.ours == pytest.approx([1e-4] * MIN_ROUNDS)
    assert result.baselines["a"] == pytest.approx([3e-4] * MIN_ROUNDS)
    assert diary.calls.count("ours") >= MIN_ROUNDS * 20


def test_a_budget_adds_rounds_up_to_a_limit() -> None:
    diary = Diary(ours=1.0)
    rounds = alternate({"": diary.contender("ours").call}, {"": 1.0}, diary.clock, budget=60.0)
    assert len(rounds[""]) == MAX_ROUNDS


def test_a_baseline_that_disagrees_is_an_error_and_nothing_is_timed() -> None:
    diary = Diary(ours=1.0, good=1.0, wrong=1.0)
    baselines = {"good": diary.contender("good"), "wrong": diary.contender("wrong", value=1.001)}
    with pytest.raises(
        DisagreementError, match=r"some fp32: y of wrong is not ours: largest row error 0\.001, at most"
    ):
        run(diary, Problem(diary.contender("ours"), baselines, work=1.0))
    assert diary.calls == ["ours", "good", "wrong"]


def test_a_baseline_that_cannot_run_is_listed_with_its_own_words() -> None:
    def fail() -> None:
        raise RuntimeError("no kernel for this\nand a long story")

    diary = Diary(ours=1.0, a=1.0)
    baselines = {"fails": Contender(fail), "absent": Missing("not installed"), "a": diary.contender("a")}
    result = run(diary, Problem(diary.contender("ours"), baselines, work=1.0))
    assert result.missing == {"fails": "RuntimeError: no kernel for this", "absent": "not installed"}
    assert list(result.baselines) == ["a"]


def test_ours_that_fails_is_no_row_of_a_table() -> None:
    with pytest.raises(ZeroDivisionError):
        run(Diary(), Problem(Contender(lambda: 1 / 0), {}, work=1.0))


def test_one_thread_is_timed_by_its_own_cpu_time_and_several_by_the_wall() -> None:
    assert clock_for("cpu", 1)(lambda: time.sleep(0.05))[1] < 0.04
    assert clock_for("cpu", 2)(lambda: time.sleep(0.05))[1] >= 0.05


# --- agreement ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@given(rows=st.integers(1, 40), width=st.integers(1, 512), where=st.randoms(use_true_random=False))
def test_one_wrong_element_among_hundreds_is_found(dtype: str, rows: int, width: int, where: Any) -> None:
    ours = torch.ones(rows, width)
    theirs = ours.clone()
    theirs[where.randrange(rows), where.randrange(width)] = 2.0
    with pytest.raises(DisagreementError):
        check_agreement("case", "them", dtype, {"y": ours}, {"y": theirs})


def test_rounding_to_bf16_is_agreement_for_bf16_and_none_for_fp32() -> None:
    exact = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    rounded = exact.bfloat16().float()
    check_agreement("case", "them", "bf16", {"y": exact}, {"y": rounded})
    with pytest.raises(DisagreementError):
        check_agreement("case", "them", "fp32", {"y": exact}, {"y": rounded})


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        (torch.ones(3, 2), r"shapes \(2, 2\) \(ours\) and \(3, 2\)"),
        (torch.tensor([[1.0, torch.nan], [1.0, 1.0]]), "largest row error inf"),
        (torch.zeros(2, 2), "largest row error inf"),
    ],
)
def test_other_shapes_and_nan_and_a_result_of_zeros_disagree(theirs: torch.Tensor, words: str) -> None:
    with pytest.raises(DisagreementError, match=words):
        check_agreement("case", "them", "bf16", {"y": torch.ones(2, 2)}, {"y": theirs})


def test_integers_agree_only_when_equal() -> None:
    ids = torch.arange(5)
    check_agreement("case", "them", "int64", {"y": ids}, {"y": ids.clone()})
    with pytest.raises(DisagreementError, match="integers differ"):
        check_agreement("case", "them", "int64", {"y": ids}, {"y": ids.flip(0)})


def test_only_shared_names_are_compared_and_at_least_one_must_be() -> None:
    one, two = torch.ones(2, 2), torch.full((2, 2), 2.0)
    check_agreement("case", "them", "fp32", {"y": one, "mine": one}, {"y": one, "yours": two})
    with pytest.raises(AssertionError, match="nothing to compare"):
        check_agreement("case", "them", "fp32", {"mine": one}, {"yours": one})


def test_tensors_larger_than_a_piece_are_compared_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moetrain.bench.agreement._CHUNK_ELEMENTS", 16)
    ours = torch.ones(9, 2, 8)
    theirs = ours.clone()
    theirs[8, 1, 7] += 0.5
    assert row_error(ours, theirs) == pytest.approx(0.5 / (7 + 1.5**2) ** 0.5)
    assert TOLERANCES["bf16"] < 0.1


# --- optional parts -------------------------------------------------------------------------------------------------


def test_a_package_that_is_not_installed_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / "needs_absent.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(NotHereError, match="the package a_package_that_nobody_has is not installed"):
        load("needs_absent:build")


def test_a_missing_module_of_ours_is_no_reason_but_a_broken_installation() -> None:
    with pytest.raises(ModuleNotFoundError):
        load("moetrain.bench.gone:build")


def test_a_builder_that_gives_a_reason_is_a_missing_baseline() -> None:
    def build(word: str) -> Contender:
        raise NotHereError(word)

    assert attempt(build, "why") == Missing("why")
