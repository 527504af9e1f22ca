"""What a trace says, against counting by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from moetrain.report.passages import Passage, Reading
from moetrain.report.trace import (
    LayerTrace,
    RoutingTrace,
    k_by_position,
    k_histogram,
    loss_by_k,
    rank_correlation,
    typical_tokens,
)

NAN = math.nan


def layer(k: list[int], ids: list[list[int]] | None = None, experts: int = 3) -> LayerTrace:
    width = max(k)
    ids = ids or [[e if e < n else -1 for e in range(width)] for n in k]
    return LayerTrace(0, experts, np.array(k), np.array(ids), np.ones((len(k), width)), None)


def trace_of(lengths: list[int], nll: list[float], *layers: LayerTrace) -> RoutingTrace:
    passages = tuple(Passage("", tuple(range(n)), ("x",) * n) for n in lengths)
    return RoutingTrace(1, Reading("", passages, ""), np.array(nll), layers)


def test_positions_begin_again_with_each_passage() -> None:
    trace = trace_of([3, 2], [NAN, 1.0, 2.0, NAN, 3.0])
    assert trace.positions.tolist() == [0, 1, 2, 0, 1]
    np.testing.assert_equal(trace.next_nll, [1.0, 2.0, NAN, 3.0, NAN])


def test_the_histogram_counts_every_k_up_to_the_most() -> None:
    assert k_histogram(layer([1, 3, 1, 2])) == [0, 2, 1, 1]


def test_positions_fall_into_buckets_of_powers_of_two() -> None:
    buckets = k_by_position(np.arange(12), np.arange(12))
    assert [(b.low, b.high, b.tokens) for b in buckets] == [(0, 0, 1), (1, 1, 1), (2, 3, 2), (4, 7, 4), (8, 11, 4)]
    assert [b.mean_k for b in buckets] == [0.0, 1.0, 2.5, 5.5, 9.5]


def test_losses_by_k_leave_out_what_has_none() -> None:
    one = layer([1, 2, 2, 1, 1])
    found = loss_by_k(trace_of([3, 2], [NAN, 1.0, 2.0, NAN, 3.0], one), one)
    assert [(row.k, row.tokens) for row in found] == [(1, 3), (2, 2)]
    assert found[0].nll == 3.0 and found[0].next_nll == 2.0
    assert found[1].nll == 1.5 and found[1].next_nll == 2.0


def test_rank_correlation_is_spearmans() -> None:
    a = np.array([1.0, 2.0, 3.0, 4.0, NAN])
    assert rank_correlation(a, np.array([1.0, 10.0, 100.0, 1000.0, 5.0])) == pytest.approx(1.0)
    assert rank_correlation(a, np.array([4.0, 3.0, 2.0, 1.0, 9.0])) == pytest.approx(-1.0)
    # With ties, ranks 1.5, 1.5, 3, 4 against 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5.
    assert rank_correlation(np.array([7.0, 7.0, 8.0, 9.0]), np.arange(4.0)) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert rank_correlation(np.ones(9), np.arange(9.0)) is None
    assert rank_correlation(a[:2], a[:2]) is None


def test_typical_tokens_are_those_over_represented_most_typical_first() -> None:
    # Expert 0 gets every 5 and half of the 6s; expert 1 the rest; expert 2 nothing.
    ids = np.array([5, 5, 5, 6, 6, 6, 6, 7])
    experts = [[0], [0], [0], [0], [0], [1], [1], [1]]
    found = typical_tokens(ids, layer([1] * 8, experts), 8)
    assert found[0] == [(5, 3)]  # 6 comes as often as at large: 2 of 5 against 4 of 8 is even less
    assert found[1] == [(7, 1), (6, 2)]
    assert found[2] == []
    score = {7: 1 * math.log(1 * 8 / (3 * 1)), 6: 2 * math.log(2 * 8 / (3 * 4))}
    assert score[7] > score[6] > 0


def test_no_more_tokens_are_named_than_asked(make_trace: Callable[..., RoutingTrace]) -> None:
    trace = make_trace([[str(i) for i in range(100)] * 2])
    assert max(map(len, typical_tokens(trace.token_ids, trace.layers[0], 5))) == 5
