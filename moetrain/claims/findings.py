"""From what the runs of a study measured to what it says of each claim."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from moetrain.claims.intervals import Paired, Verdict, paired_difference, verdict, worst
from moetrain.claims.lab import Results
from moetrain.claims.measures import Measured
from moetrain.claims.study import Claim, Comparison, Study


@dataclass(frozen=True)
class Compared:
    """A comparison, and what came of it."""

    comparison: Comparison
    difference: Paired
    verdict: Verdict


@dataclass(frozen=True)
class Finding:
    """A claim, and what came of it."""

    claim: Claim
    compared: tuple[Compared, ...]

    @property
    def verdict(self) -> Verdict:
        """That of the worst comparison."""
        return worst([c.verdict for c in self.compared])


@dataclass(frozen=True)
class ArmSummary:
    """An arm over its seeds: means, and the standard deviation of the loss."""

    loss: float
    spread: float
    mean_k: float
    step_seconds: float
    parameters: int
    flops: float


def find(study: Study, results: Results) -> list[Finding]:
    """Every claim of the study."""
    return [Finding(claim, tuple(_compare(c, results) for c in claim.comparisons)) for claim in study.claims]


def summarize(runs: Sequence[Measured]) -> ArmSummary:
    """One arm's row of the table."""
    losses = [run.loss for run in runs]
    return ArmSummary(
        loss=statistics.fmean(losses),
        spread=statistics.stdev(losses),
        mean_k=statistics.fmean(run.mean_k for run in runs),
        step_seconds=statistics.median(run.step_seconds for run in runs),
        parameters=runs[0].parameters,
        flops=statistics.fmean(run.flops for run in runs),
    )


def _compare(comparison: Comparison, results: Results) -> Compared:
    losses = [[run.loss for run in results[name]] for name in (comparison.arm, comparison.baseline)]
    difference = paired_difference(*losses)
    return Compared(comparison, difference, verdict(difference, comparison.expects))
