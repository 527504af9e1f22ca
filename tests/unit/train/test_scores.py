"""The measures of GLUE against their definitions, pair by pair and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moetrain.train.scores import (
    classification_scores,
    f1,
    matthews_correlation,
    pearson,
    ranks,
    regression_scores,
)

PREDICTED = np.array([1, 1, 0, 1, 0, 0, 1, 0])
ACTUAL = np.array([1, 0, 0, 1, 1, 0, 1, 1])  # 3 true positives, 1 false positive, 2 false negatives, 2 true negatives


def test_two_classes_by_hand() -> None:
    scores = classification_scores(PREDICTED, ACTUAL, 2)
    assert scores["accuracy"] == 5 / 8
    assert scores["f1"] == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    expected = (3 * 2 - 1 * 2) / math.sqrt((3 + 1) * (3 + 2) * (2 + 1) * (2 + 2))
    assert scores["matthews_correlation"] == pytest.approx(expected)


def test_matthews_correlation_of_more_classes_is_that_of_their_indicators() -> None:
    """R_K = cov(X, Y) / sqrt(cov(X, X) cov(Y, Y)), where cov sums over the indicator of each class."""
    random = np.random.default_rng(0)
    predicted, actual = random.integers(0, 4, 200), random.integers(0, 4, 200)
    x, y = np.eye(4)[predicted], np.eye(4)[actual]
    x, y = x - x.mean(0), y - y.mean(0)
    expected = (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())
    assert matthews_correlation(predicted, actual, 4) == pytest.approx(expected)
    assert "f1" not in classification_scores(predicted, actual, 4)


def test_where_nothing_can_be_correlated() -> None:
    same = np.zeros(5, dtype=np.int64)
    assert matthews_correlation(same, ACTUAL[:5], 2) == 0.0
    assert f1(same == 1, ACTUAL[:5] == 1) == 0.0
    assert math.isnan(pearson(np.ones(3), np.arange(3)))


def test_pearson_and_spearman_by_definition() -> None:
    random = np.random.default_rng(1)
    x = random.integers(0, 6, 40).astype(float)  # with ties
    y = x**3 + random.standard_normal(40)

    def rank(values: np.ndarray) -> np.ndarray:
        below = np.array([sum(other < value for other in values) for value in values])
        equal = np.array([sum(other == value for other in values) for value in values])
        return below + (equal + 1) / 2

    np.testing.assert_allclose(ranks(x), rank(x))
    scores = regression_scores(x, y)
    assert scores["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert scores["spearman"] == pytest.approx(np.corrcoef(rank(x), rank(y))[0, 1])


def test_any_increasing_function_has_spearman_one() -> None:
    x = np.array([3.0, -1.0, 2.0, 10.0])
    for function in (np.exp, np.cbrt):
        assert regression_scores(x, function(x))["spearman"] == pytest.approx(1.0)
    assert all(regression_scores(x, -x)[name] == pytest.approx(-1.0) for name in ("pearson", "spearman"))
