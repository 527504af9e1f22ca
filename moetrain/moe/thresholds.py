"""Thresholds that follow the running quantiles of a stream of numbers, by nothing but counts of how many exceed them.

Counts are integers, so every layout of a run computes the same thresholds to the bit. And they are counted at the very
thresholds that decide the routing (and at two quartiles): no finer histogram, whose bins would each be one more place
where the last bit of a number, which does depend on the layout, could tip a count.

Legend: B buckets of numbers that are tracked apart, M thresholds of a bucket.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_LN3 = math.log(3.0)
_LEAST_SCALE = 1e-4
_LEAST_VARIANCE = 0.05


@dataclass(frozen=True)
class ThresholdCounts:
    """What was seen at the thresholds during one step, fp64.

    Attributes:
        numbers_B: how many numbers came.
        above_BM: how many of them exceeded each threshold.
        above_quartiles_B2: and each quartile.
    """

    numbers_B: Tensor
    above_BM: Tensor
    above_quartiles_B2: Tensor


@dataclass(frozen=True)
class QuantileState:
    """A location and a scale per bucket, given by two tracked quartiles, and thresholds in units of them.

    A logistic distribution with location mu and scale s has its quartiles at mu -+ s ln 3 and exceeds
    mu + s ln((1 - share) / share) with probability `share`. So thresholds start there, and their offsets learn only how
    the true distribution differs; a shift or a stretch of the distribution moves the quartiles alone.

    Attributes:
        quartiles_B2: lower and upper.
        offsets_BM: thresholds as (threshold - mu) / s, ascending.
        visits_B: steps in which the bucket had numbers.
    """

    quartiles_B2: Tensor
    offsets_BM: Tensor
    visits_B: Tensor

    @classmethod
    def initial(cls, shares: Sequence[float], buckets: int) -> QuantileState:
        """For numbers of a standard logistic distribution."""
        offsets_M = torch.tensor([_logistic(share) for share in shares], dtype=torch.float64)
        return cls(
            torch.tensor([-_LN3, _LN3], dtype=torch.float64).repeat(buckets, 1),
            offsets_M.repeat(buckets, 1),
            torch.zeros(buckets, dtype=torch.float64),
        )

    @property
    def location(self) -> Tensor:
        """[B, 1]."""
        return self.quartiles_B2.mean(dim=1, keepdim=True)

    @property
    def scale(self) -> Tensor:
        """[B, 1], above zero."""
        return (self.quartiles_B2[:, 1:] - self.quartiles_B2[:, :1]).clamp(min=2 * _LEAST_SCALE * _LN3) / (2 * _LN3)

    def thresholds(self) -> Tensor:
        """[B, M]."""
        return self.location + self.scale * self.offsets_BM

    def moved(self, counts: ThresholdCounts, shares: Sequence[float], rate: float) -> QuantileState:
        """One step of stochastic approximation: a threshold that too many numbers exceed rises.

        The error of a share divided by the density there is the error of the threshold, and of that the part `rate` is
        corrected. The density is the logistic one, share (1 - share) / s, with a lower bound in the tails, where true
        densities are often much higher. A bucket that never had numbers takes the state of the one before it, so that
        positions beyond the trained length are treated like the last trained ones.
        """
        seen_B1 = (counts.numbers_B > 0)[:, None]
        numbers_B1 = counts.numbers_B.clamp(min=1)[:, None]
        shares_M = torch.tensor(shares, dtype=torch.float64)
        slope_M = (shares_M * (1 - shares_M)).clamp(min=_LEAST_VARIANCE)
        offsets_BM = self.offsets_BM + rate * (counts.above_BM / numbers_B1 - shares_M) / slope_M
        error_B2 = counts.above_quartiles_B2 / numbers_B1 - torch.tensor([0.75, 0.25], dtype=torch.float64)
        reach_B1 = self.scale * _LN3
        quartiles_B2 = torch.cat([self.location - reach_B1, self.location + reach_B1], dim=1)
        quartiles_B2 = quartiles_B2 + rate * self.scale * error_B2 / (0.75 * 0.25)
        moved = QuantileState(
            torch.where(seen_B1, quartiles_B2.sort(dim=1).values, self.quartiles_B2),
            torch.where(seen_B1, offsets_BM.sort(dim=1).values, self.offsets_BM),
            self.visits_B + seen_B1[:, 0],
        )
        return moved._with_unseen_filled()

    def _with_unseen_filled(self) -> QuantileState:
        source, sources = 0, []
        for bucket, visits in enumerate(self.visits_B.tolist()):
            source = bucket if visits > 0 else source
            sources.append(source)
        return QuantileState(self.quartiles_B2[sources], self.offsets_BM[sources], self.visits_B)


def _logistic(share: float) -> float:
    """What a standard logistic number exceeds with this probability."""
    return -math.inf if share >= 1.0 else math.log((1.0 - share) / share)
