"""Run folders and traces made of chosen numbers, the metrics as a run's own callback writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moetrain.report.passages import Passage, Reading
from moetrain.report.run_folder import RunFolder, open_run
from moetrain.report.trace import LayerTrace, RoutingTrace
from moetrain.train.callbacks.records import to_json
from moetrain.train.metrics import EvalReport, RouterStats, StepReport, flatten, flatten_lists

DA_MOE = {"type": "da_moe", "mean_k": 2.0, "max_k": 4}
MOE = {"num_experts": 4, "ffn_hidden_size": 16, "router": DA_MOE}


def config(moe: dict[str, Any] | None = None, name: str = "small") -> dict[str, Any]:
    model = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 64}
    return {
        "run": {"dir": "run", "name": name},
        "model": {**model, "vocab_size": 384, "seq_length": 32, "moe": moe},
        "data": {"tokenizer": {"path": "small.model"}, "train": [{"path": "small"}]},
        "training": {"train_iters": 100, "global_batch_size": 4},
    }


def train_row(
    step: int, loss: float = 3.0, layers: Iterable[int] = (0, 1), load: Iterable[int] = (1, 2, 3, 4), **more: Any
) -> str:
    stats = [RouterStats.from_counts(i, list(load), [0, 1, 2, 1, 0], controllers={"threshold": 0.5}) for i in layers]
    report = StepReport(
        iteration=step,
        train_iters=100,
        loss=loss,
        grad_norm=1.0,
        lr=1e-3,
        tokens=128,
        consumed_samples=4 * step,
        consumed_tokens=128 * step,
        step_seconds=0.1,
        aux={"load_balance": 1.1, "z_loss": 0.2},
        router=stats,
    )
    row = {**flatten(report), "perf/tokens_per_second": 1280.0, **flatten_lists(report), **more}
    return to_json({"kind": "train", "iteration": step, **row})


def eval_row(step: int, loss: float = 3.2) -> str:
    report = EvalReport(step, loss, 24.5, 5.0, 0.1)
    return to_json({"kind": "eval", "iteration": step, **flatten(report)})


@pytest.fixture
def rows() -> Any:
    """Makers of lines of metrics.jsonl."""

    class Rows:
        train = staticmethod(train_row)
        eval = staticmethod(eval_row)

    return Rows


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunFolder]:
    """A run folder of these lines, opened."""

    def make(lines: list[str] | None = None, moe: dict[str, Any] | None = MOE, name: str = "small") -> RunFolder:
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(config(moe, name)))
        if lines is None:
            layers = (0, 1) if moe else ()
            lines = [train_row(step, 3.0 - step / 100, layers) for step in (1, 10, 20)] + [eval_row(20)]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        return open_run(folder)

    return make


@pytest.fixture
def make_trace() -> Callable[..., RoutingTrace]:
    """A trace of random decisions over the given pieces; `importance` off and `fixed_k` make a top-k model's."""

    def make(
        pieces: list[list[str]],
        layers: int = 2,
        experts: int = 4,
        max_k: int = 3,
        fixed_k: bool = False,
        importance: bool = True,
    ) -> RoutingTrace:
        random = np.random.default_rng(0)
        vocabulary = {text: i for i, text in enumerate(dict.fromkeys(text for texts in pieces for text in texts))}
        passages = tuple(
            Passage(f"passage {n}", tuple(vocabulary[text] for text in texts), tuple(texts))
            for n, texts in enumerate(pieces)
        )
        tokens = sum(map(len, pieces))
        nll = random.exponential(2.0, tokens)
        nll[np.cumsum([0, *map(len, pieces[:-1])])] = np.nan
        traces = []
        for layer in range(layers):
            k = np.full(tokens, max_k) if fixed_k else random.integers(1, max_k + 1, tokens)
            ids = np.argsort(random.random((tokens, experts)), axis=1)[:, :max_k]
            used = np.arange(max_k) < k[:, None]
            weights = np.where(used, -np.sort(-random.random((tokens, max_k)), axis=1), 0.0)
            seen = random.random(tokens) if importance else None
            traces.append(LayerTrace(layer, experts, k, np.where(used, ids, -1), weights, seen))
        return RoutingTrace(20, Reading("chosen words", passages, ""), nll, tuple(traces))

    return make
