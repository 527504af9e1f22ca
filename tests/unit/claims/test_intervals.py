"""The arithmetic of the verdicts."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from moetrain.claims.intervals import NOISE, Paired, paired_difference, verdict, worst


def test_the_interval_is_students_of_the_paired_differences() -> None:
    # t(4) at 97.5 % is 2.776445 (any table).
    arm, baseline = [1.0, 2.0, 3.0, 4.0, 6.0], [1.5, 2.0, 2.0, 4.5, 5.0]
    differences = [-0.5, 0.0, 1.0, -0.5, 1.0]
    half = 2.776445 * statistics.stdev(differences) / math.sqrt(5)
    found = paired_difference(arm, baseline)
    assert found.mean == pytest.approx(0.2)
    assert found.low == pytest.approx(0.2 - half, rel=1e-6)
    assert found.high == pytest.approx(0.2 + half, rel=1e-6)


def test_ninety_five_of_a_hundred_intervals_hold_the_truth() -> None:
    numbers = random.Random(0)
    held = 0
    for _ in range(2000):
        base = [numbers.gauss(3, 1) for _ in range(5)]
        arm = [b + numbers.gauss(0.3, 0.2) for b in base]
        difference = paired_difference(arm, base)
        held += difference.low <= 0.3 <= difference.high
    assert 0.935 < held / 2000 < 0.965


@pytest.mark.parametrize(
    ("mean", "half", "lower", "tie"),
    [
        (-0.05, 0.02, "supported", "refuted"),
        (0.05, 0.02, "refuted", "refuted"),
        (-0.05, 0.06, "not shown", "not shown"),
        (-NOISE / 2, NOISE / 4, "not shown", "supported"),
        (0.0, NOISE / 2, "not shown", "supported"),
        (0.0, 2 * NOISE, "not shown", "not shown"),
    ],
)
def test_verdicts_follow_from_the_interval_and_the_noise(mean: float, half: float, lower: str, tie: str) -> None:
    difference = Paired(mean, mean - half, mean + half, 5)
    assert verdict(difference, "lower") == lower
    assert verdict(difference, "tie") == tie
    assert verdict(difference, "none") == "observed"


def test_a_claim_is_as_good_as_its_worst_comparison() -> None:
    assert worst(["supported", "not shown", "refuted"]) == "refuted"
    assert worst(["supported", "not shown"]) == "not shown"
    assert worst(["supported", "observed"]) == "supported"
    assert worst(["observed"]) == "observed"
