"""What one call of `moetrain bench ops` measures. No torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

DEVICES = ("cpu", "cuda")
DTYPES = ("bf16", "fp32")
ROUTINGS = ("balanced", "zipf", "all_to_one")


@dataclass(frozen=True)
class Settings:
    """Every combination of the tuples is a point. The letters of the tables stand beside the sizes.

    threads: CPU threads, one process each; on CUDA the only entry is what torch takes by itself (0).
    ffn: F, hidden units of an expert. hidden: D. tokens: T. top_k: K, expert slots of a token.
    seq: L, length of the sequence whose attention is measured.
    hyper_hidden, hyper_ffn: D and F of the expert whose time HyperMoE's is compared with.
    only: names of benchmarks; empty means all.
    budget: seconds to measure for, in all; see :mod:`moetrain.bench.measure` for what it cannot shorten.
    """

    device: str
    threads: tuple[int, ...]
    dtypes: tuple[str, ...]
    experts: tuple[int, ...]
    ffn: tuple[int, ...]
    hidden: int
    tokens: int
    top_k: int
    routing: tuple[str, ...]
    seq: int = 4096
    hyper_hidden: int = 768
    hyper_ffn: int = 3072
    only: tuple[str, ...] = ()
    budget: float = 1200.0

    def to_json(self) -> str:
        """For the worker's command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """The inverse of :meth:`to_json`."""
        values: dict[str, Any] = json.loads(text)
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **lists})

    def for_threads(self, threads: int) -> Settings:
        """The part of one process: its number of threads, and its share of the time."""
        return replace(self, threads=(threads,), budget=self.budget / len(self.threads))

    def command(self) -> str:
        """The command line that measures this."""
        lists = {
            "dtype": self.dtypes,
            "experts": self.experts,
            "ffn": self.ffn,
            "hidden": (self.hidden,),
            "tokens": (self.tokens,),
            "top-k": (self.top_k,),
            "routing": self.routing,
            "seq": (self.seq,),
            "budget": (f"{self.budget:g}",),
        }
        if self.device == "cpu":
            lists = {"threads": self.threads, **lists}
        words = [f"--{name} {','.join(map(str, values))}" for name, values in lists.items()]
        words += [f"--only {name}" for name in self.only]
        return " ".join([f"moetrain bench ops --device {self.device}", *words])


def default_settings(device: str, cores: int) -> Settings:
    """CPU: sizes of a laptop's experiment. CUDA: sizes of a large model's layer, in less than eight minutes."""
    if device == "cpu":
        return Settings(
            device="cpu",
            threads=(1, 2) if cores > 1 else (1,),
            dtypes=DTYPES,
            experts=(8, 16, 64),
            ffn=(1024, 2048),
            hidden=512,
            tokens=4096,
            top_k=2,
            routing=ROUTINGS,
        )
    return Settings(
        device="cuda",
        threads=(0,),
        dtypes=("bf16",),
        experts=(8, 64),
        ffn=(1408, 14336),
        hidden=4096,
        tokens=16384,
        top_k=2,
        routing=("balanced", "zipf"),
        budget=180.0,
    )
