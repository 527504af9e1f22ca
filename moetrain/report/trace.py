"""What a checkpoint did with some text, and what that says. NumPy alone.

Legend: N tokens of all passages, one after another; K the most experts that a token can get.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moetrain.report.passages import Reading


@dataclass(frozen=True)
class LayerTrace:
    """A MoE layer's routing. `importance_N` is fp32 in [0, 1], or None where the router knows none."""

    layer: int
    num_experts: int
    num_selected_N: np.ndarray
    expert_ids_NK: np.ndarray
    weights_NK: np.ndarray
    importance_N: np.ndarray | None


@dataclass(frozen=True)
class RoutingTrace:
    """One forward pass over each passage.

    `nll_N` is -ln p of a token given those before it, nats; NaN for the first of a passage.
    """

    step: int
    reading: Reading
    nll_N: np.ndarray
    layers: tuple[LayerTrace, ...]

    @property
    def token_ids(self) -> np.ndarray:
        """Vocabulary ids."""
        return np.array([i for passage in self.reading.passages for i in passage.ids], dtype=np.int64)

    @property
    def positions(self) -> np.ndarray:
        """Place of each token in its passage."""
        return np.concatenate([np.arange(len(passage.ids)) for passage in self.reading.passages])

    @property
    def next_nll(self) -> np.ndarray:
        """The loss of the prediction made at each token: the NLL of its successor; NaN for the last of a passage."""
        shifted = np.append(self.nll_N[1:], np.nan)
        return np.where(np.append(self.positions[1:], 0) == 0, np.nan, shifted)


@dataclass(frozen=True)
class PositionBucket:
    """Tokens at positions `low` to `high` (the last bucket as far as there are tokens)."""

    low: int
    high: int
    tokens: int
    mean_k: float


@dataclass(frozen=True)
class LossOfK:
    """Tokens that got `k` experts: their own mean NLL, and that of the predictions made at them; NaN without any."""

    k: int
    tokens: int
    nll: float
    next_nll: float


def k_histogram(layer: LayerTrace) -> list[int]:
    """Tokens with 0, 1, ... K experts."""
    return np.bincount(layer.num_selected_N, minlength=layer.expert_ids_NK.shape[1] + 1).tolist()


def k_by_position(positions_N: np.ndarray, num_selected_N: np.ndarray) -> list[PositionBucket]:
    """Mean K at positions 0, 1, 2-3, 4-7, 8-15, ..."""
    bucket_N = np.where(positions_N > 0, np.floor(np.log2(np.maximum(positions_N, 1))) + 1, 0).astype(int)
    found = []
    for bucket in range(int(bucket_N.max()) + 1):
        inside = bucket_N == bucket
        if inside.any():
            low = 0 if bucket == 0 else 1 << (bucket - 1)
            high = int(positions_N[inside].max())
            found.append(PositionBucket(low, high, int(inside.sum()), float(num_selected_N[inside].mean())))
    return found


def loss_by_k(trace: RoutingTrace, layer: LayerTrace) -> list[LossOfK]:
    """For each K that occurs."""
    found = []
    for k in np.unique(layer.num_selected_N):
        at = layer.num_selected_N == k
        found.append(LossOfK(int(k), int(at.sum()), _mean(trace.nll_N[at]), _mean(trace.next_nll[at])))
    return found


def rank_correlation(a_N: np.ndarray, b_N: np.ndarray) -> float | None:
    """Spearman's, over tokens where both are finite; None where one of them does not vary."""
    both = np.isfinite(a_N) & np.isfinite(b_N)
    if both.sum() < 3:
        return None
    a, b = _ranks(a_N[both]), _ranks(b_N[both])
    if a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def pooled(trace: RoutingTrace) -> tuple[RoutingTrace, LayerTrace]:
    """All layers as if they were one that sees every passage once for each."""
    times = len(trace.layers)
    reading = replace(trace.reading, passages=trace.reading.passages * times)
    first = trace.layers[0]
    importance = [layer.importance_N for layer in trace.layers]
    pooled = LayerTrace(
        layer=-1,
        num_experts=first.num_experts,
        num_selected_N=np.concatenate([layer.num_selected_N for layer in trace.layers]),
        expert_ids_NK=np.concatenate([layer.expert_ids_NK for layer in trace.layers]),
        weights_NK=np.concatenate([layer.weights_NK for layer in trace.layers]),
        importance_N=None if any(i is None for i in importance) else np.concatenate(importance),  # pyright: ignore
    )
    return replace(trace, reading=reading, nll_N=np.tile(trace.nll_N, times)), pooled


def typical_tokens(ids_N: np.ndarray, layer: LayerTrace, most: int) -> list[list[tuple[int, int]]]:
    """For each expert the (vocabulary id, number of times) of at most `most` tokens that it gets more often than
    tokens at large.

    Ranked by n_et ln(n_et N / (n_e n_t)), a token's part of the divergence between what the expert gets and what
    there is: a frequent token must be a little over-represented, a rare one much.
    """
    vocabulary, index_N, count_V = np.unique(ids_N, return_inverse=True, return_counts=True)
    used_NK = layer.expert_ids_NK >= 0
    pairs = layer.expert_ids_NK[used_NK] * len(vocabulary) + index_N[np.nonzero(used_NK)[0]]
    share_EV = np.bincount(pairs, minlength=layer.num_experts * len(vocabulary)).reshape(layer.num_experts, -1)
    expected_EV = share_EV.sum(axis=1, keepdims=True) * count_V / len(ids_N)
    score_EV = share_EV * np.log(np.where(share_EV > 0, share_EV, 1) / np.where(share_EV > 0, expected_EV, 1))
    best_EM = np.argsort(-score_EV, axis=1, kind="stable")[:, :most]
    return [
        [(int(vocabulary[i]), int(share_V[i])) for i in best_M if score_V[i] > 1e-9]
        for best_M, share_V, score_V in zip(best_EM, share_EV, score_EV, strict=True)
    ]


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks with ties at their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[inverse]
