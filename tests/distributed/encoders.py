"""Tiny encoders of the parity tests, and their batches."""

from __future__ import annotations

from typing import Any

import torch
from parity import SINGLE, Layout, layout_of, tiny_config, whole_controllers, whole_weights

from moetrain.config.schema import RunConfig
from moetrain.data.loader import MicroBatch
from moetrain.runtime.groups import create_groups
from moetrain.train.setup import build_step

STEPS = 3
MASK = 63
ROUTER = {"type": "da_moe", "importance": "col_max", "mean_k": 2.0, "controller_rate": 1.0}
HEAD = {"outputs": 3, "pooling": "mean"}


def encoder_config(layout: Layout = SINGLE, zero: int = 1, tied: bool = False, **changes: object) -> RunConfig:
    """The model of the parity table as a masked language model: DA-MoE by `col_max`, and HyperMoE."""
    settings: dict[str, Any] = {
        "model__type": "encoder",
        "model__init_method_std": 0.25,  # flat attention would give every token the same importance
        "model__moe__router": ROUTER,
        "training__objective": {"type": "masked_lm"},
        # Adam makes a whole step of a gradient that is nothing but rounding, unless eps is above it (at 1e-6 the
        # hypernetwork's smallest bias, which starts at zero, differs by more than the bound).
        "optimizer__eps": 1e-5,
    }
    if changes.get("model__moe", True) is None:
        del settings["model__moe__router"]
    return tiny_config(layout, zero, tied, **(settings | changes))


def classifier_config(layout: Layout = SINGLE, zero: int = 1, tied: bool = False, **changes: object) -> RunConfig:
    """The same encoder with a head of three classes, on padded texts."""
    settings: dict[str, Any] = {
        "model__head": HEAD,
        "training__objective": {"type": "classify", "classes": ["a", "b", "c"]},
        "data__valid": [{"path": "unused"}],
    }
    return encoder_config(layout, zero, tied, **(settings | changes))


def batch_of(step: int, config: RunConfig, data_rank: int, data_size: int) -> list[MicroBatch]:
    """This rank's share of a global batch: for masked language models progressions with between none and nine hidden
    tokens a sequence, so that ranks and micro-batches have unequal counts; for sequence tasks texts of 3 to 16 tokens.
    """
    generator = torch.Generator().manual_seed(7000 + step)
    size, length = config.training.global_batch_size, config.model.seq_length
    start = torch.randint(0, 60, (size, 1), generator=generator)
    stride = torch.randint(1, 4, (size, 1), generator=generator)
    rows = (start + stride * torch.arange(length)) % 60
    if config.model.head is None:
        draw, share = torch.rand(size, length, generator=generator), torch.arange(size)[:, None] / (2 * size)
        tokens = rows.masked_fill(draw < 0.7 * share, MASK)  # the rest is predicted though it is there to see
        if step == STEPS:
            share = share + 0.5  # of the evaluation: enough labels that some guess hits by chance
        parts = {"tokens": tokens, "labels": rows, "weights": (draw < share).float()}
    else:
        lengths = torch.randint(3, length + 1, (size, 1), generator=generator)
        valid = torch.arange(length) < lengths
        labels = stride[:, 0] - 1 if config.training.objective.type == "classify" else stride[:, 0].float()
        weights = (torch.arange(size) % 7 != 3).float()
        parts = {"tokens": rows.masked_fill(~valid, 0), "labels": labels, "weights": weights, "valid": valid}
    mine = {k: v.view(-1, data_size, config.training.micro_batch_size, *v.shape[1:]) for k, v in parts.items()}
    count = len(mine["tokens"])
    return [MicroBatch(**{k: v[i, data_rank].contiguous() for k, v in mine.items()}) for i in range(count)]


def train(configs: list[RunConfig]) -> list[dict[str, Any]]:
    """Run in every rank: three steps of each config, and an evaluation of one more batch."""
    groups = create_groups(layout_of(configs[0]), seed=1)
    results = []
    for config in configs:
        step = build_step(config, groups, torch.device("cpu"))
        at = groups.coordinates.data, groups.layout.data
        outcomes = [step.run(batch_of(i, config, *at), config.optimizer.lr) for i in range(STEPS)]
        evaluation = step.evaluate(batch_of(STEPS, config, *at))
        results.append(
            {
                "losses": [o.loss for o in outcomes],
                "norms": [o.grad_norm for o in outcomes],
                "histograms": [c.k_histogram for o in outcomes for c in o.router.values()],
                "balances": [x for o in outcomes for c in o.router.values() for x in (c.load_balance, c.z_loss)],
                "weights": whole_weights(step),
                "controllers": whole_controllers(step),
                "evaluation": evaluation,
            }
        )
    return results


def assert_same(run: dict[str, Any], reference: dict[str, Any], bound: float = 1e-5) -> None:
    """Losses, norms, auxiliary losses and weights within the bound of layout parity; counts and controllers equal."""
    for kind in ("losses", "norms", "balances"):
        for mine, theirs in zip(run[kind], reference[kind], strict=True):
            assert abs(mine - theirs) <= bound * abs(theirs), kind
    assert run["histograms"] == reference["histograms"]
    assert run["controllers"] == reference["controllers"]
    assert run["weights"].keys() == reference["weights"].keys()
    for name, weight in reference["weights"].items():
        assert float((run["weights"][name] - weight).norm()) <= bound * float(weight.norm()), name
    mine, theirs = run["evaluation"], reference["evaluation"]
    assert abs(mine.loss - theirs.loss) <= bound * abs(theirs.loss)
    assert (mine.labels, mine.hits) == (theirs.labels, theirs.hits)
    if theirs.outputs is not None:
        torch.testing.assert_close(mine.outputs, theirs.outputs, rtol=1e-4, atol=1e-5)
