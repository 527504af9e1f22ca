"""How good predictions are, by the measures of GLUE (arXiv 1804.07461): plain numbers in, plain numbers out."""

from __future__ import annotations

import math

import numpy
from numpy import ndarray


def classification_scores(predicted: ndarray, labels: ndarray, num_classes: int) -> dict[str, float]:
    """Accuracy and Matthews correlation of int class numbers [N]; of two classes also F1 of the second."""
    scores = {
        "accuracy": float((predicted == labels).mean()),
        "matthews_correlation": matthews_correlation(predicted, labels, num_classes),
    }
    return scores | ({"f1": f1(predicted == 1, labels == 1)} if num_classes == 2 else {})


def regression_scores(predicted: ndarray, labels: ndarray) -> dict[str, float]:
    """Correlations of scores [N]: linear (Pearson) and of ranks (Spearman)."""
    return {"pearson": pearson(predicted, labels), "spearman": pearson(ranks(predicted), ranks(labels))}


def f1(predicted: ndarray, actual: ndarray) -> float:
    """Harmonic mean of precision and recall of booleans [N]; 0 without a true positive."""
    hits = int((predicted & actual).sum())
    return 2 * hits / (int(predicted.sum()) + int(actual.sum())) if hits else 0.0


def matthews_correlation(predicted: ndarray, labels: ndarray, num_classes: int) -> float:
    """Matthews correlation, by Gorodkin's R_K for any number of classes (doi:10.1016/j.compbiolchem.2004.09.006).
    0 where predictions or labels are all the same, as usual."""
    confusion = numpy.zeros((num_classes, num_classes))
    numpy.add.at(confusion, (labels, predicted), 1.0)
    actual, guessed, total = confusion.sum(axis=1), confusion.sum(axis=0), confusion.sum()
    covariance = numpy.trace(confusion) * total - actual @ guessed
    spread = (total**2 - guessed @ guessed) * (total**2 - actual @ actual)
    return float(covariance / math.sqrt(spread)) if spread > 0 else 0.0


def pearson(x: ndarray, y: ndarray) -> float:
    """Linear correlation; NaN where one of them is constant and there is none."""
    x, y = x.astype(numpy.float64) - x.mean(), y.astype(numpy.float64) - y.mean()
    spread = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / spread if spread > 0 else math.nan


def ranks(x: ndarray) -> ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, which, counts = numpy.unique(x, return_inverse=True, return_counts=True)
    last = numpy.cumsum(counts)
    return (last - (counts - 1) / 2)[which]
