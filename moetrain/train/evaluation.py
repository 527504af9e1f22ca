"""What a validation says: the outcomes of its global batches as one report."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy
import torch

from moetrain.config.objectives import ClassifyConfig, ObjectiveConfig, RegressConfig
from moetrain.data.examples import OrderedExamples
from moetrain.train.data import RunData
from moetrain.train.metrics import EvalReport
from moetrain.train.scores import classification_scores, regression_scores
from moetrain.train.step import EvalOutcome


def summarize(outcomes: Sequence[EvalOutcome], data: RunData, objective: ObjectiveConfig) -> EvalReport:
    """The report of a validation, but for its iteration and time. Every label counts the same, in whichever batch it
    was."""
    labels = math.fsum(outcome.labels for outcome in outcomes)
    loss = math.fsum(outcome.loss * outcome.labels for outcome in outcomes) / max(labels, 1.0)
    if isinstance(objective, ClassifyConfig | RegressConfig):
        return EvalReport(0, loss, None, None, 0.0, _sequence_scores(outcomes, data, objective))
    scores = {}
    if objective.type == "masked_lm":
        scores["accuracy"] = math.fsum(outcome.hits or 0.0 for outcome in outcomes) / max(labels, 1.0)
    return EvalReport(0, loss, math.exp(min(loss, 700.0)), data.unigram_entropy, 0.0, scores)


def _sequence_scores(
    outcomes: Sequence[EvalOutcome], data: RunData, objective: ClassifyConfig | RegressConfig
) -> dict[str, float]:
    assert isinstance(data.valid, OrderedExamples)
    labels = data.valid.examples.labels.numpy()
    outputs = torch.cat([o.outputs for o in outcomes if o.outputs is not None])[: len(labels)].cpu().numpy()
    if isinstance(objective, RegressConfig):
        return regression_scores(outputs[:, 0], labels)
    return classification_scores(numpy.argmax(outputs, axis=1), labels, objective.outputs)
