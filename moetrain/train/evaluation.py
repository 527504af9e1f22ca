"""What a validation says: the outcomes of its global batches as one report."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moetrain.config.objectives import ObjectiveConfig
from moetrain.train.data import RunData
from moetrain.train.metrics import EvalReport
from moetrain.train.step import EvalOutcome


def summarize(outcomes: Sequence[EvalOutcome], data: RunData, objective: ObjectiveConfig) -> EvalReport:
    """The report of a validation, but for its time. Every label counts the same, in whichever batch it was."""
    labels = math.fsum(outcome.labels for outcome in outcomes)
    loss = math.fsum(outcome.loss * outcome.labels for outcome in outcomes) / max(labels, 1.0)
    scores = {}
    if objective.type == "masked_lm":
        scores["accuracy"] = math.fsum(outcome.hits or 0.0 for outcome in outcomes) / max(labels, 1.0)
    return EvalReport(0, loss, math.exp(min(loss, 700.0)), data.unigram_entropy, 0.0, scores)
