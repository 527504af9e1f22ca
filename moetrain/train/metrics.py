"""What a step reports, how fast the run goes, and the flat names under which both are written.

The reports are plain numbers: whoever makes one has already brought the figures off the device and combined the ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

# Dense bf16 tensor-core peak, FLOP/s, from NVIDIA's data sheets (where only the figure "with sparsity" is printed, half
# of it). First match in the device's name wins, so a variant stands before its family.
_KNOWN_BF16_PEAK = (
    ("GB200", 2500e12),
    ("B300", 2250e12),
    ("B200", 2250e12),
    ("B100", 1750e12),
    ("H200 NVL", 835.5e12),
    ("H200", 989.4e12),
    ("H100 PCIe", 756.5e12),
    ("H100 NVL", 835.5e12),
    ("H100", 989.4e12),
    ("H800", 989.4e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("A30", 165e12),
    ("A10", 125e12),
    ("L4", 121e12),
)


@dataclass(frozen=True)
class RouterStats:
    """One MoE layer's routing in one step, over all ranks."""

    layer: int
    """0-based global layer number"""
    load: list[float]
    """share of the (token, expert) pairs that each expert got; sums to 1"""
    max_over_mean: float
    """busiest expert's share over the mean share; 1 is perfect balance"""
    entropy: float
    """of `load`, nats; `max_entropy` is perfect balance"""
    k_histogram: list[int]
    """number of tokens with 0, 1, ... K_max experts"""
    mean_k: float
    """experts per token"""
    controllers: Mapping[str, float] = field(default_factory=dict)
    """the router's scalar controllers by name, such as `threshold`"""
    hyper_norm_ratio: float | None = None
    """rms of the hyper-expert's output over rms of the experts' output, where there is one"""
    dropped: int | None = None
    """(token, expert) pairs that found no place within an expert's capacity, where it has one"""

    @property
    def max_entropy(self) -> float:
        """Entropy of a uniform load over as many experts, nats."""
        return math.log(len(self.load))

    @classmethod
    def from_counts(
        cls,
        layer: int,
        tokens_per_expert: Sequence[float],
        k_histogram: Sequence[int],
        controllers: Mapping[str, float] | None = None,
        hyper_norm_ratio: float | None = None,
        dropped: int | None = None,
    ) -> RouterStats:
        """From the two counts that ranks can simply add up. A layer that saw no token has an all-zero load."""
        pairs = sum(tokens_per_expert)
        load = [n / pairs if pairs else 0.0 for n in tokens_per_expert]
        tokens = sum(k_histogram)
        return cls(
            layer=layer,
            load=load,
            max_over_mean=max(load) * len(load),
            entropy=-sum(p * math.log(p) for p in load if p > 0),
            k_histogram=list(k_histogram),
            mean_k=sum(k * n for k, n in enumerate(k_histogram)) / tokens if tokens else 0.0,
            controllers=controllers or {},
            hyper_norm_ratio=hyper_norm_ratio,
            dropped=dropped,
        )


@dataclass(frozen=True)
class StepReport:
    """One completed training step, as all ranks agree on it."""

    iteration: int
    """1-based: the number of completed steps"""
    train_iters: int
    loss: float
    """mean cross-entropy per token, nats, without auxiliary losses"""
    grad_norm: float
    """global gradient norm before clipping"""
    lr: float
    tokens: int
    """in this step, over all ranks"""
    consumed_samples: int
    consumed_tokens: int
    step_seconds: float
    skipped: bool = False
    """the gradients were not finite, and the weights were left alone"""
    skipped_total: int = 0
    aux: dict[str, float] = field(default_factory=dict)
    """further scalars by name: load_balance, z_loss, mean_k ..."""
    router: list[RouterStats] | None = None
    """one entry per MoE layer, in the order of the layers"""


@dataclass(frozen=True)
class EvalReport:
    """One validation."""

    iteration: int
    """completed training steps at this point"""
    loss: float
    """as in training: mean cross-entropy per token, nats; of sequence tasks per sequence, or mean squared error"""
    perplexity: float | None
    """None for sequence tasks"""
    unigram_entropy: float | None
    """nats: what a model that knows only token frequencies would reach on the same tokens"""
    seconds: float
    scores: dict[str, float] = field(default_factory=dict)
    """further figures of the objective by name: accuracy, f1 ..."""


@dataclass(frozen=True)
class SaveReport:
    """One save that is over."""

    iteration: int
    """completed training steps in it; training may be further"""
    path: Path
    """the committed checkpoint, or where it would be"""
    error: str | None
    """why there is none"""
    stall_seconds: float
    """how long training stood still for it, on this rank"""
    write_seconds: float
    """from the copy of the state to the commit"""
    nbytes: int
    """of all ranks' files; 0 after an error"""
    failed_in_a_row: int = 0
    """failures up to this one, which included; 0 after a success"""


@dataclass(frozen=True)
class PeakFlops:
    """What one process's device can do at most, FLOP/s, and how that is known."""

    value: float
    source: Literal["known", "measured"]


class Throughput:
    """Tokens and FLOPs per second over the recent steps, and the time that remains.

    An exponential average of tokens over one of seconds: weights cancel at the start, so no bias correction is needed,
    and `smoothing` 0.9 remembers about ten steps.
    """

    def __init__(
        self,
        flops_per_token: float | None = None,
        peak: PeakFlops | None = None,
        world_size: int = 1,
        smoothing: float = 0.9,
    ) -> None:
        assert 0.0 <= smoothing < 1.0, smoothing
        self.flops_per_token = flops_per_token
        self.peak = peak
        self.world_size = world_size
        self._smoothing = smoothing
        self._tokens = self._seconds = self._steps = 0.0

    def update(self, tokens: int, seconds: float) -> None:
        """Adds one step: tokens over all ranks, and the step's wall-clock seconds."""
        keep = self._smoothing
        self._tokens = keep * self._tokens + tokens
        self._seconds = keep * self._seconds + seconds
        self._steps = keep * self._steps + 1.0

    @property
    def tokens_per_second(self) -> float | None:
        """Over all ranks; None before the first step."""
        return self._tokens / self._seconds if self._seconds > 0 else None

    @property
    def flops_per_second(self) -> float | None:
        """Model FLOP/s over all ranks (recomputation is not counted); None when the FLOPs per token are unknown."""
        if self.flops_per_token is None or self.tokens_per_second is None:
            return None
        return self.flops_per_token * self.tokens_per_second

    @property
    def mfu(self) -> float | None:
        """Model FLOP utilization, 0..1: model FLOP/s over the peak of all devices."""
        if self.peak is None or self.flops_per_second is None:
            return None
        return self.flops_per_second / (self.peak.value * self.world_size)

    def eta_seconds(self, remaining_iters: int) -> float | None:
        """Seconds for so many more steps at the recent pace."""
        return remaining_iters * self._seconds / self._steps if self._steps else None

    def flatten(self) -> dict[str, float]:
        """The known figures, under `perf/`."""
        figures = {
            "perf/tokens_per_second": self.tokens_per_second,
            "perf/flops_per_second": self.flops_per_second,
            "perf/mfu": self.mfu,
        }
        return {name: value for name, value in figures.items() if value is not None}


def peak_flops(device: torch.device, dtype: torch.dtype) -> PeakFlops:
    """Peak matrix-product rate of `device` in `dtype`.

    `known`: bf16 on a GPU of NVIDIA's data sheets. `measured`: anything else, by square products for about 0.2 s on
    this process's device and threads; with several processes on one CPU, what they get when they measure together.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        known = known_bf16_peak(name)
        if known is not None:
            return PeakFlops(known, "known")
    return PeakFlops(_measured_matmul_flops(device, dtype), "measured")


def known_bf16_peak(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by the name that its driver gives it, or None."""
    words = device_name.replace("-", " ")
    return next((value for key, value in _KNOWN_BF16_PEAK if _names(words, key)), None)


def _names(words: str, key: str) -> bool:
    """Whole words only: an `A10` is no `A100`, an `L4` no `L40S`."""
    return f" {key} " in f" {words} "


def _measured_matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    size = 1024 if device.type == "cpu" else 8192
    a = torch.ones(size, size, device=device, dtype=dtype)
    out = torch.empty_like(a)
    torch.mm(a, a, out=out)
    best = math.inf
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or best == math.inf:
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def flatten(report: StepReport | EvalReport | SaveReport) -> dict[str, float]:
    """Every scalar of a report under its flat name: `train/loss`, `router/layer03/max_over_mean`, `eval/loss` ...

    Lists (the load of each expert, the histogram of K) are not scalars; see `flatten_lists`. Unknown values (None) are
    left out.
    """
    if isinstance(report, EvalReport):
        return _known(
            {
                "eval/loss": report.loss,
                "eval/perplexity": report.perplexity,
                "eval/unigram_entropy": report.unigram_entropy,
                "eval/seconds": report.seconds,
                **{f"eval/{name}": value for name, value in report.scores.items()},
            }
        )
    if isinstance(report, SaveReport):
        return {
            "checkpoint/stall_seconds": report.stall_seconds,
            "checkpoint/write_seconds": report.write_seconds,
            "checkpoint/bytes": report.nbytes,
            "checkpoint/failed_in_a_row": report.failed_in_a_row,
        }
    flat: dict[str, float | None] = {
        "train/loss": report.loss,
        "train/grad_norm": report.grad_norm,
        "train/lr": report.lr,
        "train/tokens": report.tokens,
        "train/consumed_samples": report.consumed_samples,
        "train/consumed_tokens": report.consumed_tokens,
        "train/step_seconds": report.step_seconds,
        "train/skipped": float(report.skipped),
        "train/skipped_total": report.skipped_total,
    }
    for name, value in report.aux.items():
        assert f"train/{name}" not in flat, f"aux scalar {name} would hide the step's own"
        flat[f"train/{name}"] = value
    for stats in report.router or []:
        at = f"router/layer{stats.layer:02d}"
        flat[f"{at}/max_over_mean"] = stats.max_over_mean
        flat[f"{at}/entropy"] = stats.entropy
        flat[f"{at}/max_entropy"] = stats.max_entropy
        flat[f"{at}/mean_k"] = stats.mean_k
        flat |= {f"{at}/{name}": value for name, value in stats.controllers.items()}
        flat[f"{at}/hyper_norm_ratio"] = stats.hyper_norm_ratio
        flat[f"{at}/dropped"] = stats.dropped
    return _known(flat)


def flatten_lists(report: StepReport) -> dict[str, list[float]]:
    """The lists of a report: `router/layer03/load` (one share per expert), `router/layer03/k_histogram` (tokens)."""
    lists: dict[str, list[float]] = {}
    for stats in report.router or []:
        at = f"router/layer{stats.layer:02d}"
        lists[f"{at}/load"] = list(stats.load)
        lists[f"{at}/k_histogram"] = [int(n) for n in stats.k_histogram]
    return lists


def _known(flat: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in flat.items() if value is not None}
