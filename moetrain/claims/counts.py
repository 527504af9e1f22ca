"""Which tokens get many experts: K by the place of a token, and by the loss of what is predicted there.

Importance that only tells where a token stands would be a schedule by position; importance that follows the loss would
spend experts where they are needed. The same held-out text for every arm and seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from moetrain.checkpoint.folders import find_step_folder
from moetrain.checkpoint.reader import CheckpointReader
from moetrain.config.loader import config_from_dict
from moetrain.data.tokenizers import load_tokenizer
from moetrain.report.passages import read_held_out
from moetrain.report.trace import k_by_position, loss_by_k, pooled, rank_correlation
from moetrain.report.tracing import trace_routing


@dataclass(frozen=True)
class Counts:
    """Of one run or of several, over held-out tokens and all MoE layers.

    Attributes:
        by_position: (first position, mean K) for positions 0, 1, 2-3, 4-7, ...
        by_k: for each K that occurs, (share of the tokens, mean loss of the predictions made at them, nats).
        with_own_loss, with_next_loss: Spearman's rank correlation of K with the loss of the token itself, and with
            that of the prediction made at it; None where K does not vary.
    """

    by_position: dict[int, float]
    by_k: dict[int, tuple[float, float]]
    with_own_loss: float | None
    with_next_loss: float | None


def measure_counts(run: Path) -> Counts:
    """Of a finished run. In a process of its own: it makes a process group."""
    with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as pool:
        return pool.submit(_measure, run).result()


def _measure(run: Path) -> Counts:
    torch.set_num_threads(1)
    with CheckpointReader(find_step_folder(run)) as reader:
        config = config_from_dict(reader.config, "the checkpoint's config")
        reading = read_held_out(config.data, load_tokenizer(config.data.tokenizer), config.model.seq_length)
        trace, layer = pooled(trace_routing(reader, reading))
    k_N = layer.num_selected_N
    return Counts(
        by_position={bucket.low: bucket.mean_k for bucket in k_by_position(trace.positions, k_N)},
        by_k={row.k: (row.tokens / len(k_N), row.next_nll) for row in loss_by_k(trace, layer)},
        with_own_loss=rank_correlation(k_N.astype(np.float64), trace.nll_N),
        with_next_loss=rank_correlation(k_N.astype(np.float64), trace.next_nll),
    )


def mean_counts(runs: Sequence[Counts]) -> Counts:
    """Means over the seeds of an arm; losses of a K over the seeds in which it occurs, weighted by its share."""
    return Counts(
        by_position={low: fmean(run.by_position[low] for run in runs) for low in runs[0].by_position},
        by_k={k: _mean_of_k([run.by_k[k] for run in runs if k in run.by_k], len(runs)) for k in _all_k(runs)},
        with_own_loss=_mean([run.with_own_loss for run in runs]),
        with_next_loss=_mean([run.with_next_loss for run in runs]),
    )


def _all_k(runs: Sequence[Counts]) -> list[int]:
    return sorted({k for run in runs for k in run.by_k})


def _mean_of_k(rows: Sequence[tuple[float, float]], runs: int) -> tuple[float, float]:
    # A K that only ends of passages got has no prediction, so no loss.
    told = [(share, loss) for share, loss in rows if not np.isnan(loss)]
    weight = sum(share for share, _ in told)
    loss = sum(share * loss for share, loss in told) / weight if weight else float("nan")
    return sum(share for share, _ in rows) / runs, loss


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return fmean(there) if there else None
