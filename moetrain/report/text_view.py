"""What the page knows of a trace: every shown token's routing, packed, and summaries over all traced tokens."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from moetrain.report.charts import rounded
from moetrain.report.thinning import pack_uint16
from moetrain.report.trace import (
    LayerTrace,
    RoutingTrace,
    k_by_position,
    k_histogram,
    loss_by_k,
    pooled,
    rank_correlation,
    typical_tokens,
)

MAX_BYTES = 1_000_000
MAX_TYPICAL = 20_000
TYPICAL_PER_EXPERT = 8


def text_view(trace: RoutingTrace) -> dict[str, Any]:
    """The JSON tree that `assets/tokens.js` draws."""
    shown = shown_passages(trace)
    tokens = sum(len(passage.ids) for passage in trace.reading.passages[:shown])
    texts = [text for passage in trace.reading.passages for text in passage.pieces]
    ids = trace.token_ids.tolist()
    # One text an id: the first place where it has one, for a byte of a longer character may have none.
    text_of: dict[int, str] = {}
    for token, text in zip(ids, texts, strict=True):
        text_of[token] = text_of.get(token) or text
    return {
        "passages": _places(trace, shown),
        "ids": ids[:tokens],
        "texts": texts[:tokens],
        "nll": [rounded(value, 4) for value in trace.nll_N[:tokens].tolist()],
        "layers": [_packed(layer, tokens) for layer in trace.layers],
        "summaries": _summaries(trace) if trace.layers else {},
        "typical": _typical(trace, text_of),
        "variableK": has_variable_k(trace),
    }


def shown_passages(trace: RoutingTrace) -> int:
    """How many passages can be shown token by token in `MAX_BYTES` of the page; one at least."""
    pairs_N = sum((layer.num_selected_N for layer in trace.layers), np.zeros(len(trace.nll_N), dtype=np.int64))
    bytes_N = 40 + (4 * len(trace.layers) + 4 * pairs_N) * 4 / 3
    ends = np.cumsum([len(passage.ids) for passage in trace.reading.passages])
    total = np.cumsum(bytes_N)[ends - 1]
    return max(1, int((total <= MAX_BYTES).sum()))


def has_variable_k(trace: RoutingTrace) -> bool:
    """Whether tokens differ in their number of experts anywhere."""
    return any(layer.num_selected_N.min() < layer.num_selected_N.max() for layer in trace.layers)


def _places(trace: RoutingTrace, shown: int) -> list[dict[str, Any]]:
    places, start = [], 0
    for passage in trace.reading.passages[:shown]:
        places.append({"title": passage.title, "start": start, "length": len(passage.ids)})
        start += len(passage.ids)
    return places


def _packed(layer: LayerTrace, tokens: int) -> dict[str, Any]:
    """`experts` and `weights` hold the pairs of one token after another, `k` says how many each has."""
    k_N, ids_NK = layer.num_selected_N[:tokens], layer.expert_ids_NK[:tokens]
    used_NK = ids_NK >= 0
    weights, weight_scale = _fixed_point(layer.weights_NK[:tokens][used_NK])
    packed = {
        "layer": layer.layer,
        "numExperts": layer.num_experts,
        "k": pack_uint16(k_N),
        "experts": pack_uint16(ids_NK[used_NK]),
        "weights": weights,
        "weightScale": weight_scale,
        "importance": None,
    }
    if layer.importance_N is not None:
        packed["importance"], packed["importanceScale"] = _fixed_point(layer.importance_N[:tokens])
    return packed


def _fixed_point(values: np.ndarray) -> tuple[str, float]:
    """Non-negative numbers as 16 bits each, and what one step of them is."""
    step = max(1.0, float(values.max(initial=0.0))) / 65535
    return pack_uint16(np.round(np.maximum(values, 0.0) / step).astype(np.int64)), step


def _summaries(trace: RoutingTrace) -> dict[str, Any]:
    """By layer number, and "all": over the (token, layer) pairs."""
    summaries = {str(layer.layer): _summary(trace, layer) for layer in trace.layers}
    if len(trace.layers) > 1:
        summaries["all"] = _summary(*pooled(trace))
    return summaries


def _summary(trace: RoutingTrace, layer: LayerTrace) -> dict[str, Any]:
    k_N = layer.num_selected_N
    rows = [asdict(row) for row in loss_by_k(trace, layer)]
    return {
        "histogram": k_histogram(layer),
        "byPosition": [
            {**asdict(bucket), "mean_k": rounded(bucket.mean_k)} for bucket in k_by_position(trace.positions, k_N)
        ],
        "lossByK": [{**row, "nll": rounded(row["nll"]), "next_nll": rounded(row["next_nll"])} for row in rows],
        "correlation": {
            "nll": _correlation(k_N, trace.nll_N),
            "next_nll": _correlation(k_N, trace.next_nll),
        },
    }


def _correlation(k_N: np.ndarray, nll_N: np.ndarray) -> float | None:
    value = rank_correlation(k_N.astype(np.float64), nll_N)
    return None if value is None else rounded(value, 3)


def _typical(trace: RoutingTrace, text_of: dict[int, str]) -> dict[str, Any]:
    """Tokens that each expert gets more often than others do; `tokens` says how often each occurs at all."""
    pairs = sum(layer.num_experts for layer in trace.layers)
    most = min(TYPICAL_PER_EXPERT, MAX_TYPICAL // pairs) if pairs else 0
    ids_N = trace.token_ids
    layers = {str(layer.layer): typical_tokens(ids_N, layer, most) for layer in trace.layers} if most else {}
    named = {token for experts in layers.values() for tokens in experts for token, _ in tokens}
    times = dict(zip(*(part.tolist() for part in np.unique(ids_N, return_counts=True)), strict=True))
    return {"layers": layers, "tokens": {str(token): [text_of[token], times[token]] for token in sorted(named)}}
