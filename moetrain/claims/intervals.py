"""Paired differences with confidence intervals, and the verdicts that follow from them by rule."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scipy import stats

from moetrain.claims.study import Expectation

CONFIDENCE = 0.95
NOISE = 0.01
"""nats per token: at these sizes a smaller difference means nothing, even where its interval leaves zero out"""

Verdict = Literal["supported", "refuted", "not shown", "observed"]


@dataclass(frozen=True)
class Paired:
    """Mean of the differences of pairs, and its interval at `CONFIDENCE` (Student's t).

    With n pairs, mean m and standard deviation s of the differences: m +- t(n - 1) s / sqrt(n).
    """

    mean: float
    low: float
    high: float
    pairs: int

    @property
    def separated(self) -> bool:
        """Whether the interval leaves zero out and the mean is more than noise."""
        return (self.low > 0 or self.high < 0) and abs(self.mean) >= NOISE


def paired_difference(arm: Sequence[float], baseline: Sequence[float]) -> Paired:
    """Of values of the same seeds in the same order; at least two."""
    differences = [a - b for a, b in zip(arm, baseline, strict=True)]
    assert len(differences) >= 2, "one pair has no spread"
    mean = statistics.fmean(differences)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1))
    half = quantile * statistics.stdev(differences) / math.sqrt(len(differences))
    return Paired(mean, mean - half, mean + half, len(differences))


def verdict(difference: Paired, expects: Expectation) -> Verdict:
    """What a difference of losses (arm minus baseline) says about what is claimed of it.

    `lower`: supported if the whole interval is below zero by more than noise in the mean, refuted if it is above.
    `tie`: supported if the whole interval lies within noise of zero, refuted if the difference is separated from it.
    Everything else is not shown. `none`: nothing was claimed.
    """
    if expects == "none":
        return "observed"
    if expects == "tie":
        if difference.low >= -NOISE and difference.high <= NOISE:
            return "supported"
        return "refuted" if difference.separated else "not shown"
    if not difference.separated:
        return "not shown"
    return "supported" if difference.mean < 0 else "refuted"


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """Of a claim that needs all of several comparisons to hold."""
    order: tuple[Verdict, ...] = ("refuted", "not shown", "supported", "observed")
    return min(verdicts, key=order.index)
