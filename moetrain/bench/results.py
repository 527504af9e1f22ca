"""What was measured, and the arithmetic of ratios. No torch: the command line reads this."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple


class Spread(NamedTuple):
    """Median and quartiles: extremes would say what else the machine was doing."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


@dataclass(frozen=True)
class Point:
    """One size of one benchmark. What a benchmark does not have is 0 or ""."""

    device: str
    dtype: str
    tokens: int
    hidden: int
    experts: int = 0
    ffn: int = 0
    top_k: int = 0
    routing: str = ""
    heads: int = 0
    measure: str = ""
    causal: bool = False

    def label(self) -> str:
        """What tells the rows of a table apart."""
        parts = [self.dtype]
        parts += [f"{letter}={value}" for letter, value in (("E", self.experts), ("F", self.ffn)) if value]
        parts += [text for text in (self.routing, self.measure, "causal" if self.causal else "") if text]
        return " ".join(parts)

    def sizes(self) -> str:
        """What the rows of a table have in common."""
        letters = {"H": self.heads, "K": self.top_k}
        if self.heads:
            letters = {"L": self.tokens, "d": self.hidden, **letters}
        else:
            letters = {"T": self.tokens, "D": self.hidden, **letters}
        return ", ".join(f"{letter} = {value}" for letter, value in letters.items() if value)


@dataclass(frozen=True)
class CaseResult:
    """Times of one point, in seconds a call.

    ours: one entry a round. baselines: the same, of the same rounds; one that is far slower has the first ones only.
    missing: why a baseline was not run. unavailable: why ours was not, and then all else is empty.
    work, unit: floating-point operations ("FLOP") or bytes ("B") of one call of ours.
    """

    benchmark: str
    point: Point
    threads: int
    ours: list[float] = field(default_factory=list)
    baselines: dict[str, list[float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    unavailable: str = ""
    work: float = 0.0
    unit: str = "FLOP"

    def seconds(self) -> float:
        """Median of ours."""
        return statistics.median(self.ours)

    def rate(self) -> float:
        """Work a second, by the median."""
        return self.work / self.seconds()

    def speedup(self, baseline: str) -> Spread:
        """The baseline's time over ours, pair by pair; above 1, ours is faster."""
        return spread([theirs / ours for ours, theirs in zip(self.ours, self.baselines[baseline], strict=False)])

    def cost(self, baseline: str) -> Spread:
        """Our time over the baseline's, pair by pair: for a baseline that does less."""
        return spread([ours / theirs for ours, theirs in zip(self.ours, self.baselines[baseline], strict=False)])

    def to_dict(self) -> dict[str, Any]:
        """JSON of all that is known."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CaseResult:
        """The inverse of :meth:`to_dict`."""
        return cls(**{**values, "point": Point(**values["point"])})


@dataclass
class Machine:
    """What the numbers are of. `peaks`: FLOP/s of a large `torch.mm`, by threads and dtype, best of several."""

    name: str
    cores: int
    flags: list[str]
    torch: str
    extension: str
    commit: str
    peaks: dict[int, dict[str, float]] = field(default_factory=dict)

    def add_peaks(self, threads: int, rates: dict[str, float]) -> None:
        """Measured again: the higher one is nearer to what the machine can do."""
        known = self.peaks.setdefault(threads, {})
        for dtype, rate in rates.items():
            known[dtype] = max(rate, known.get(dtype, 0.0))
