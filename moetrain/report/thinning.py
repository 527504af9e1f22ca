"""Long runs in few numbers: a page must stay small, and a spike must not get lost."""

from __future__ import annotations

import base64

import numpy as np

from moetrain.report.metrics_table import Frames, Series

MAX_POINTS = 500
MAX_CELLS = 400_000
_LOWEST, _STEP = -5.0, 15.0 / 254  # byte 1 is a load of 1/32 of the mean, byte 255 of 1024 times the mean


def thin(series: Series, most: int = MAX_POINTS) -> Series:
    """At most `most` of the points: the first, the last, and the lowest and highest of each stretch between them, so
    that whatever stands out still does."""
    count = len(series.steps)
    if count <= most:
        return series
    stretches = (most - 2) // 2
    width = -(-(count - 2) // stretches)
    inner = np.minimum(np.arange(1, stretches * width + 1), count - 2).reshape(stretches, width)
    values = series.values[inner]
    finite = np.isfinite(values)
    low = np.where(finite, values, np.inf).argmin(axis=1)
    high = np.where(finite, values, -np.inf).argmax(axis=1)
    # What is not finite stands out most of all.
    high = np.where(finite.all(axis=1), high, finite.argmin(axis=1))
    rows = np.arange(stretches)
    index = np.unique(np.concatenate([[0, count - 1], inner[rows, low], inner[rows, high]]))
    return Series(series.steps[index], series.values[index])


def columns(frames: Frames, most: int) -> tuple[list[tuple[int, int]], np.ndarray]:
    """Means of at most `most` stretches of rows, fp64 [columns, size], and the (first, last) step of each."""
    stretches = np.array_split(np.arange(len(frames.steps)), min(most, len(frames.steps)))
    spans = [(int(frames.steps[s[0]]), int(frames.steps[s[-1]])) for s in stretches]
    return spans, np.stack([frames.values[s].mean(axis=0, dtype=np.float64) for s in stretches])


def columns_for(layers: int, size: int, cells: int, most: int = 160) -> int:
    """How many columns the heatmaps of so many layers, `size` cells high, may have if all have `cells` together."""
    return max(8, min(most, cells // max(1, layers * size)))


def pack_ratios(ratios: np.ndarray) -> str:
    """Ratios to the mean as one byte each, base64: 0 is none at all, else steps of 4% from 1/32 to 1024. The error of
    2% cannot be seen in a color."""
    with np.errstate(divide="ignore"):
        level = np.round((np.log2(ratios) - _LOWEST) / _STEP) + 1
    return _base64(np.where(ratios > 0, np.clip(level, 1, 255), 0).astype(np.uint8))


def pack_shares(shares: np.ndarray) -> str:
    """Shares in [0, 1] as one byte each, base64."""
    return _base64(np.round(np.clip(shares, 0, 1) * 255).astype(np.uint8))


def pack_uint16(values: np.ndarray) -> str:
    """Whole numbers below 65536, little-endian, base64."""
    assert values.size == 0 or (values.min() >= 0 and values.max() < 1 << 16)
    return _base64(values.astype("<u2"))


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode("ascii")
