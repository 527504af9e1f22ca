"""The settings of DA-MoE's router, and the mean number of experts as arithmetic."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from pydantic import Field, model_validator

from moetrain.config.routing import Gates, RouterConfig, at_most_experts
from moetrain.config.section import NonNegativeFloat, PositiveFloat, PositiveInt

CAUSAL_IMPORTANCE = ("self_weight", "row_max", "row_entropy")
NONCAUSAL_IMPORTANCE = ("col_max", "col_sum")
OWN_IMPORTANCE = ("predicted", "random")
"""Causal measures that the DA-MoE router makes of the hidden state, without attention."""


class DAMoERouterConfig(RouterConfig):
    """Attention gives each token an importance, and importance decides how many experts it gets (arXiv 2409.06669).

    `budget: paper` is the paper's K = ceil(I * num_experts). `budget: mean_k` ranks the token among the importances of
    earlier steps: K = clip(ceil(alpha * rank), min_k, max_k), with the alpha that makes the mean `mean_k`. The ranks
    are read off thresholds that follow the running quantiles of importance in each layer.
    """

    implementation = "moetrain.moe.routers.da_moe:DAMoERouter"

    type: Literal["da_moe"] = "da_moe"
    importance: Literal["self_weight", "row_max", "row_entropy", "col_max", "col_sum", "predicted", "random"] = Field(
        default="self_weight",
        description="what makes a token important: a statistic of attention, averaged over heads (col_max and col_sum "
        "look at the future: encoders only); predicted: the rank of the attention that it will receive, foretold from "
        "its hidden state; random: a hash of the token, a control for experiments",
    )
    direction: Literal["high", "low"] = Field(
        default="high", description="which tokens get more experts: those of high or those of low importance"
    )
    debias: Literal["none", "position"] = Field(
        default="none",
        description="whom a token is ranked with: all tokens, or those of like position (by log2); row_max with "
        "position is `row_max_debiased` of the literature",
    )
    budget: Literal["mean_k", "paper"] = Field(
        default="mean_k", description="from importance to a number of experts: by rank at a fixed mean, or ceil(I * E)"
    )
    mean_k: PositiveFloat = Field(default=2.0, description="mean number of experts per token (budget: mean_k)")
    min_k: PositiveInt = Field(default=1, description="the fewest experts that a token may get")
    max_k: PositiveInt | None = Field(
        default=None, description="the most experts that a token may get; default: num_experts"
    )
    controller_rate: float = Field(
        default=0.3, gt=0.0, le=1.0, description="part of a threshold's error that one step corrects (budget: mean_k)"
    )
    teacher: Literal["relative", "received"] = Field(
        default="relative",
        description="importance: predicted learns the rank, within the sequence, of the attention that a token "
        "receives: as it is, or relative to what uniform attention would give to its position",
    )
    predictor_loss_coeff: NonNegativeFloat = Field(
        default=0.01,
        description="loss of the predictor (importance: predicted); its gradient reaches the predictor only",
    )
    gates: Gates = "raw"
    allow_noncausal: bool = Field(
        default=False,
        description="let a decoder route by col_max or col_sum, which know the future: only to show that it leaks",
    )

    @model_validator(mode="after")
    def _settings_agree(self) -> DAMoERouterConfig:
        top = self.max_k if self.max_k is not None else float("inf")
        if self.min_k > top:
            raise ValueError(f"min_k ({self.min_k}) must not exceed max_k ({self.max_k})")
        if self.budget == "mean_k" and not self.min_k <= self.mean_k <= top:
            raise ValueError(f"mean_k ({self.mean_k}) must lie between min_k ({self.min_k}) and max_k ({self.max_k})")
        if self.budget == "paper":
            reason = "budget (paper) is ceil(importance * num_experts) of the importance itself"
            self._need(reason, "direction", "debias", "mean_k", "controller_rate")
            if self.importance == "col_sum":
                raise ValueError(
                    "importance (col_sum) is no share of one, so budget paper would give most tokens every expert; "
                    "legal with it: budget mean_k"
                )
        if self.importance != "predicted":
            self._need(f"importance ({self.importance}) learns nothing", "teacher", "predictor_loss_coeff")
        return self

    def _need(self, reason: str, *names: str) -> None:
        """These settings would say nothing, so they must stand at their defaults."""
        for name in names:
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default:
                raise ValueError(f"{name} ({value}) has no effect: {reason}; legal: {default}")

    def selectable(self, num_experts: int) -> range:
        top = self.max_k or num_experts
        return range(self.min_k, (self.min_k + len(self.shares(num_experts)) if self.budget == "mean_k" else top) + 1)

    def shares(self, num_experts: int, mean_k: float | None = None) -> tuple[float, ...]:
        """For budget mean_k, the shares of the tokens that get more than min_k, min_k + 1, ... experts, all above
        zero; with another `mean_k`, as many shares for that mean."""
        shares = rank_shares(self.mean_k, self.min_k, self.max_k or num_experts)
        return shares if mean_k is None else rank_shares(mean_k, self.min_k, self.min_k + len(shares), len(shares))

    def expected_mean_k(self, num_experts: int) -> float:
        return self.mean_k if self.budget == "mean_k" else super().expected_mean_k(num_experts)

    def describe(self, num_experts: int) -> str:
        choice = f"{self.mean_k:g} on average" if self.budget == "mean_k" else f"ceil(importance x {num_experts})"
        measure = ("low " if self.direction == "low" else "") + self.importance
        if self.debias == "position":
            measure += " for the position"
        return f"by {measure}, {choice}, at most {self.selectable(num_experts)[-1]}"

    def problems(self, num_experts: int) -> list[str]:
        names = ("min_k", "max_k", "mean_k") if self.budget == "mean_k" else ("min_k", "max_k")
        return at_most_experts(self, names, num_experts)

    @property
    def attention_measure(self) -> str | None:
        return None if self.importance in OWN_IMPORTANCE else self.importance

    @property
    def attention_teacher(self) -> str | None:
        return self.teacher if self.importance == "predicted" else None

    def extra_parameters(self, hidden_size: int) -> dict[str, tuple[int, ...]]:
        return {"predictor": (hidden_size,)} if self.importance == "predicted" else {}

    @property
    def allows_noncausal(self) -> bool:
        return self.allow_noncausal

    @property
    def position_buckets(self) -> int:
        """Groups of positions that are ranked apart: b holds positions 2^b - 1 to 2^(b+1) - 2, the last all beyond."""
        return 16 if self.debias == "position" else 1

    def first_k(self, num_experts: int) -> int:
        """With `debias: position`, experts of the first token, which attention cannot rank: `mean_k`, rounded."""
        return min(int(self.mean_k + 0.5), self.selectable(num_experts)[-1])

    @property
    def has_thresholds(self) -> bool:
        """Whether the number of experts varies and is held at a mean."""
        return self.budget == "mean_k" and self.min_k < self.mean_k

    @property
    def respects_token_mask(self) -> bool:
        return True

    @property
    def reported(self) -> tuple[str, ...]:
        return ("threshold",) if self.has_thresholds else ()

    @property
    def num_statistics(self) -> int:
        if not self.has_thresholds:
            return 0
        # Few experts may cut the number of thresholds; the statistics have room for all.
        return self.position_buckets * (len(rank_shares(self.mean_k, self.min_k, 10**6)) + 3)


@lru_cache
def rank_shares(mean_k: float, min_k: int, max_k: int, number: int | None = None) -> tuple[float, ...]:
    """Shares of tokens with more than k experts, for k = min_k, min_k + 1, ..., while they are above zero (or `number`
    of them), if K = clip(ceil(alpha * U), min_k, max_k) with U uniform on [0, 1] and alpha such that K's mean is
    `mean_k`: max(0, 1 - k / alpha). Without the upper limit, alpha is about 2 mean_k - 1 for min_k = 1."""
    if mean_k >= max_k:
        return (1.0,) * (max_k - min_k)

    def mean(alpha: float) -> float:
        whole = min(max_k - 1, int(alpha))  # the last k with a share
        return min_k + sum(1.0 - k / alpha for k in range(min_k, whole + 1))

    low, high = float(min_k), 2.0 * max(mean_k, 1.0)
    while mean(high) < mean_k:
        low, high = high, 2.0 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < mean_k else (low, middle)
    shares = [max(0.0, 1.0 - k / high) for k in range(min_k, min(max_k, int(high) + 1))]
    if number is None:
        return tuple(share for share in shares if share > 1e-9)
    return tuple((shares + [0.0] * number)[:number])
