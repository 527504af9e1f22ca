"""D1-D6: does importance by attention decide well how many experts a token gets, at an equal number of experts?

DA-MoE, arXiv 2409.06669. What each control isolates stands in docs/concepts/claims.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moetrain.claims.study import Arm, Claim, Comparison, Study
from moetrain.config.schema import RunConfig

K = 2
_MEASURES: dict[str, dict[str, Any]] = {
    "row_entropy": {"importance": "row_entropy"},
    "self_weight": {"importance": "self_weight"},
    "row_max_debiased": {"importance": "row_max", "debias": "position"},
    "predicted": {"importance": "predicted"},
}
_DIRECTIONS = ("high", "low")


def damoe_study(base: RunConfig) -> Study:
    """The study at the sizes of `base`, a plain MoE model."""
    arms = (*_fixed(), *_by_importance(), *_as_in_the_paper(), *_encoders(), *_others())
    return Study("damoe", "DA-MoE", "arXiv 2409.06669", arms, _CLAIMS)


def varying_arms(study: Study) -> list[str]:
    """The decoders whose tokens get different numbers of experts."""
    return [
        arm.name
        for arm in study.arms
        if "model.type" not in arm.settings and arm.settings["model.moe.router"]["type"] != "top_k"
    ]


def _router(name: str, title: str, router: dict[str, Any], **more: Any) -> Arm:
    return Arm(name, title, {"model.moe.router": router}, **more)


def _da_moe(**settings: Any) -> dict[str, Any]:
    return {"type": "da_moe", "mean_k": float(K), **settings}


def _fixed() -> list[Arm]:
    return [_router("fixed", f"every token {K} experts", {"type": "top_k", "top_k": K})]


def _by_importance() -> list[Arm]:
    arms = [
        _router(
            f"{name}-{direction}",
            f"{name}, more experts where it is {direction}",
            _da_moe(**measure, direction=direction),
        )
        for name, measure in _MEASURES.items()
        for direction in _DIRECTIONS
    ]
    # Budgets are held by rank, so every importance gives the same histogram of K: chance here has that of all of them.
    chance = _router("random", "the same counts, handed out by chance", _da_moe(importance="random"))
    return [*arms, chance]


def _as_in_the_paper() -> list[Arm]:
    def fixed_at(count: float) -> Mapping[str, Any]:
        return {"model.moe.router.top_k": int(min(max(count, 1), 8))}

    return [
        _router(
            "paper",
            "the paper's K = ceil(I N), row_max",
            {"type": "da_moe", "importance": "row_max", "budget": "paper"},
        ),
        _router(
            "paper-below",
            "every token the paper's mean K, rounded down",
            {"type": "top_k", "top_k": K},
            after="paper",
            derive=lambda outcome: fixed_at(math.floor(outcome.mean_k)),
        ),
        _router(
            "paper-above",
            "every token the paper's mean K, rounded up",
            {"type": "top_k", "top_k": K},
            after="paper",
            derive=lambda outcome: fixed_at(math.ceil(outcome.mean_k)),
        ),
        _router(
            "leak",
            "causal, but importance is attention received (col_max): K knows the future",
            _da_moe(importance="col_max", allow_noncausal=True),
        ),
    ]


def _encoders() -> list[Arm]:
    encoder = {"model.type": "encoder", "training.objective": {"type": "masked_lm"}}
    routers = [
        ("encoder-fixed", f"encoder, every token {K} experts", {"type": "top_k", "top_k": K}),
        ("encoder-col_max", "encoder, attention received (col_max)", _da_moe(importance="col_max")),
        ("encoder-random", "encoder, the same counts, handed out by chance", _da_moe(importance="random")),
    ]
    return [Arm(name, title, {**encoder, "model.moe.router": router}) for name, title, router in routers]


def _others() -> list[Arm]:
    return [
        # Top-p holds no mean: its own is in the table of arms.
        _router("top_p", "top-p at a probability of 0.4", {"type": "top_p", "threshold": 0.4}),
        _router("bias_threshold", "bias threshold", {"type": "bias_threshold", "mean_k": float(K)}),
        _router("relu", "ReLU (ReMoE)", {"type": "relu", "mean_k": float(K)}),
    ]


_CLAIMS = (
    Claim(
        "D1",
        f"At an equal mean of {K} experts, a number by importance has a lower loss than the same number for all.",
        tuple(
            Comparison(f"{measure}-{direction}", "fixed", "lower", f"{measure}, {direction}")
            for measure in _MEASURES
            for direction in _DIRECTIONS
        ),
    ),
    Claim(
        "D2",
        "It is importance, not the mere variation: the same numbers of experts handed out by chance are worse.",
        tuple(Comparison(f"{measure}-high", "random", "lower", f"{measure} against chance") for measure in _MEASURES),
    ),
    Claim(
        "D3",
        "The paper's own K = ceil(I N) has a lower loss than a fixed K of the same mean (its whole neighbors).",
        (
            Comparison("paper", "paper-below", "lower", "against the mean rounded down: fewer experts"),
            Comparison("paper", "paper-above", "lower", "against the mean rounded up: more experts"),
        ),
    ),
    Claim(
        "D4",
        "Where attention received is no leak, in an encoder, it has a lower loss than a fixed K, and than chance.",
        (
            Comparison("encoder-col_max", "encoder-fixed", "lower", "against a fixed K"),
            Comparison("encoder-col_max", "encoder-random", "lower", "against the same counts at random"),
        ),
    ),
    Claim(
        "D5",
        "In a decoder, attention received leaks the future into the routing, and the loss of training is not that of "
        "decoding.",
        (Comparison("leak", "fixed", "none", "loss as training sees it; the loss of decoding is below"),),
    ),
    Claim(
        "D6",
        "How do routers without attention do at the same budget (top-p: at its own)?",
        tuple(Comparison(name, "fixed", "none", name) for name in ("top_p", "bias_threshold", "relu")),
    ),
)
