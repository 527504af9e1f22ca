"""The settings of every router, told apart by `type`, and what the rest of the program may ask of them. No torch.

A router is two things: its settings, a `RouterConfig`, and the module that they name as `implementation`, a
`moetrain.moe.routing.Router`. A router of another package may keep both in one file. It is registered by one entry
point in the group `moetrain.routers`, whose value is the settings class; then its `type` is legal in every config.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import lru_cache, reduce
from importlib.metadata import EntryPoint, entry_points
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from moetrain.config.section import NonNegativeFloat, PositiveFloat, PositiveInt, Section
from moetrain.errors import ConfigError

CAUSAL_IMPORTANCE = ("self_weight", "row_max", "row_entropy")
NONCAUSAL_IMPORTANCE = ("col_max", "col_sum")
OWN_IMPORTANCE = ("predicted", "random")
"""Causal measures that the DA-MoE router makes of the hidden state, without attention."""

Gates = Literal["raw", "renormalized"]


class RouterConfig(Section):
    """What all routers' settings have in common. The defaults suit a router that wants nothing special.

    Attributes:
        implementation: `module:Class` of the router.
    """

    implementation: ClassVar[str]

    type: str

    @abstractmethod
    def selectable(self, num_experts: int) -> range:
        """The numbers of experts that a token may get."""

    def expected_mean_k(self, num_experts: int) -> float:
        """Mean number of experts per token, or its upper bound where only training can tell."""
        return float(self.selectable(num_experts)[-1])

    @abstractmethod
    def describe(self, num_experts: int) -> str:
        """In a few words, how many experts a token gets and what decides it: "top 2"."""

    def problems(self, num_experts: int) -> list[str]:
        """What is wrong with these settings for a layer of `num_experts` experts, in sentences that begin with
        `router.` and the setting's name."""
        return []

    @property
    def attention_measure(self) -> str | None:
        """The statistic that the layer's attention computes for the router (`RoutingContext.importance_T`)."""
        return None

    @property
    def attention_teacher(self) -> str | None:
        """What the router learns to foretell: in training, and only there, `RoutingContext.importance_T` is the rank of
        the attention that a token receives, `received` or `relative` (`moetrain.model.attention`). It knows the future,
        so nothing but a loss may come of it."""
        return None

    def extra_parameters(self, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the router's parameters besides its gate."""
        return {}

    @property
    def allows_noncausal(self) -> bool:
        """Whether a measure that looks at later tokens is accepted in a decoder, for a demonstration."""
        return False

    @property
    def respects_token_mask(self) -> bool:
        """Whether the router never prefers an expert with a score of minus infinity to another one, and computes
        nothing but numbers of such scores. It must hand its context to `Router.logits`, which puts the scores of hidden
        experts there."""
        return False

    @property
    def reported(self) -> tuple[str, ...]:
        """Names of scalar controllers that are shown in the metrics of each layer."""
        return ()

    @property
    def num_statistics(self) -> int:
        """Length of `RoutingDecision.statistics`."""
        return 0


class _BestScoresConfig(RouterConfig):
    """The best `top_k` experts by score, perhaps of the best groups of experts only."""

    top_k: PositiveInt = Field(default=2, description="experts per token")
    scores: Literal["softmax", "sigmoid"] = Field(
        default="softmax", description="of logits: probabilities over all experts, or an affinity to each by itself"
    )
    gates: Gates = Field(
        default="raw",
        description="weight of an expert: its score, or that score divided by the sum over the selected ones (which "
        "gives the router no task gradient at top_k = 1)",
    )
    scaling_factor: PositiveFloat = Field(default=1.0, description="on all weights (DeepSeek-V3: 2.5)")
    groups: PositiveInt = Field(default=1, description="groups of neighboring experts; must divide num_experts")
    top_groups: PositiveInt | None = Field(
        default=None, description="groups that a token may choose from; default: all of them"
    )
    group_score: Literal["top2_sum", "max"] = Field(
        default="top2_sum",
        description="of a group: sum of its two best scores (DeepSeek-V3), or its best (DeepSeek-V2)",
    )

    def selectable(self, num_experts: int) -> range:
        return range(self.top_k, self.top_k + 1)

    def describe(self, num_experts: int) -> str:
        scores = " by sigmoid" if self.scores == "sigmoid" else ""
        limit = self.top_groups not in (None, self.groups)
        groups = f" of the best {self.top_groups} of {self.groups} groups" if limit else ""
        return f"top {self.top_k}{scores}{groups}"

    def problems(self, num_experts: int) -> list[str]:
        found = at_most_experts(self, ("top_k", "groups"), num_experts)
        top_groups = self.top_groups or self.groups
        if num_experts % self.groups:
            found.append(f"router.groups ({self.groups}) must divide num_experts ({num_experts})")
        if top_groups > self.groups:
            found.append(f"router.top_groups ({top_groups}) must not exceed router.groups ({self.groups})")
        elif not found and self.top_k > (reachable := top_groups * (num_experts // self.groups)):
            found.append(
                f"router.top_k ({self.top_k}) must not exceed the {reachable} experts of router.top_groups "
                f"({top_groups}) groups"
            )
        return found


class TopKRouterConfig(_BestScoresConfig):
    """Every token goes to the same number of experts (Switch, GShard)."""

    implementation = "moetrain.moe.routers.top_k:TopKRouter"

    type: Literal["top_k"] = "top_k"

    @property
    def respects_token_mask(self) -> bool:
        return True


class ExpertBiasRouterConfig(_BestScoresConfig):
    """Top k with a bias per expert that only selection sees and that moves toward balanced loads (DeepSeek-V3)."""

    implementation = "moetrain.moe.routers.expert_bias:ExpertBiasRouter"

    type: Literal["expert_bias"] = "expert_bias"
    scores: Literal["softmax", "sigmoid"] = Field(
        default="sigmoid", description="of logits: probabilities over all experts, or an affinity to each by itself"
    )
    bias_rate: PositiveFloat = Field(default=1e-3, description="how far each bias moves in a step")

    def describe(self, num_experts: int) -> str:
        return f"{super().describe(num_experts)}, balanced by biases"


class TopPRouterConfig(RouterConfig):
    """As many of the most probable experts as it takes to exceed a probability (arXiv 2403.07652; XMoE)."""

    implementation = "moetrain.moe.routers.top_p:TopPRouter"

    type: Literal["top_p"] = "top_p"
    threshold: float = Field(
        default=0.4, gt=0.0, lt=1.0, description="probability that the selected experts exceed together (p)"
    )
    max_k: PositiveInt | None = Field(
        default=None, description="the most experts a token may get; default: num_experts"
    )
    entropy_loss_coeff: NonNegativeFloat = Field(
        default=1e-4, description="entropy of the probabilities, without which they flatten and K grows"
    )

    def selectable(self, num_experts: int) -> range:
        return range(1, (self.max_k or num_experts) + 1)

    def describe(self, num_experts: int) -> str:
        return f"the best that exceed {self.threshold:g} together, at most {self.selectable(num_experts)[-1]}"

    def problems(self, num_experts: int) -> list[str]:
        return at_most_experts(self, ("max_k",), num_experts)


class _MeanKConfig(RouterConfig):
    """A number of experts that a controller holds at a mean."""

    mean_k: float = Field(default=2.0, gt=1.0, description="target mean number of experts per token; above 1")
    max_k: PositiveInt | None = Field(
        default=None, description="the most experts a token may get; default: num_experts"
    )

    def selectable(self, num_experts: int) -> range:
        return range(1, (self.max_k or num_experts) + 1)

    def expected_mean_k(self, num_experts: int) -> float:
        return self.mean_k

    def problems(self, num_experts: int) -> list[str]:
        found = at_most_experts(self, ("max_k",), num_experts)
        if not found and self.mean_k >= (most := self.selectable(num_experts)[-1]):
            found.append(
                f"router.mean_k ({self.mean_k:g}) must be below the most experts that a token may get ({most})"
            )
        return found


class ReLURouterConfig(_MeanKConfig):
    """Every expert with a positive score; an L1 penalty that a controller sets holds the mean K (ReMoE)."""

    implementation = "moetrain.moe.routers.relu:ReLURouter"

    type: Literal["relu"] = "relu"
    l1_coeff_init: PositiveFloat = Field(
        default=1e-8, lt=1.0, description="smallest and first coefficient of the penalty"
    )
    l1_coeff_step: float = Field(
        default=1.2, gt=1.0, description="by which the coefficient is at most multiplied, or divided, in a step"
    )
    controller: Literal["proportional", "sign"] = Field(
        default="proportional",
        description="whole steps, up or down (sign, as published), which swing around the target, or steps in "
        "proportion to the error",
    )

    def describe(self, num_experts: int) -> str:
        return f"those of positive score, {self.mean_k:g} on average, at most {self.selectable(num_experts)[-1]}"

    @property
    def reported(self) -> tuple[str, ...]:
        return ("log_l1_coeff",)


class BiasThresholdRouterConfig(_MeanKConfig):
    """Every expert whose affinity and bias are positive together; the biases hold both mean K and balance."""

    implementation = "moetrain.moe.routers.bias_threshold:BiasThresholdRouter"

    type: Literal["bias_threshold"] = "bias_threshold"
    rule: Literal["joint", "separate"] = Field(
        default="joint",
        description="joint: balance among the experts, and one common move toward the budget; separate: each expert "
        "toward its part of the budget, simpler and noisier",
    )
    bias_rate: PositiveFloat = Field(default=1e-3, description="how far a bias moves in a step")

    def describe(self, num_experts: int) -> str:
        return f"those above their thresholds, {self.mean_k:g} on average, at most {self.selectable(num_experts)[-1]}"


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
            self._need(reason, "direction", "debias")
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


def at_most_experts(router: RouterConfig, names: tuple[str, ...], num_experts: int) -> list[str]:
    """A sentence for each of the router's settings `names` that is set and exceeds `num_experts`."""
    values = {name: getattr(router, name) for name in names}
    return [
        f"router.{name} ({value}) must not exceed num_experts ({num_experts})"
        for name, value in values.items()
        if value is not None and value > num_experts
    ]


BUILT_IN: tuple[type[RouterConfig], ...] = (
    TopKRouterConfig,
    DAMoERouterConfig,
    ExpertBiasRouterConfig,
    TopPRouterConfig,
    ReLURouterConfig,
    BiasThresholdRouterConfig,
)
ENTRY_POINTS = "moetrain.routers"


def known_routers() -> tuple[type[RouterConfig], ...]:
    """The settings classes of the built-in routers and of those that installed packages register.

    Raises:
        ConfigError: an entry point does not lead to a settings class with a `type` of its own.
    """
    known = {kind.model_fields["type"].default: kind for kind in BUILT_IN}
    for entry in entry_points(group=ENTRY_POINTS):
        kind = _load(entry)
        name = kind.model_fields["type"].default
        if name in known:
            raise ConfigError(f"router type {name!r} of {entry.value} is taken by {known[name].__name__}")
        known[name] = kind
    return tuple(known.values())


def _load(entry: EntryPoint) -> type[RouterConfig]:
    where = f"entry point {entry.name} = {entry.value} of group {ENTRY_POINTS}"
    try:
        kind: Any = entry.load()
    except Exception as error:  # whatever another package's import raises
        raise ConfigError(f"{where} cannot be loaded: {type(error).__name__}: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, RouterConfig)):
        raise ConfigError(f"{where} must be a subclass of moetrain.config.routers.RouterConfig")
    if not isinstance(kind.model_fields["type"].default, str):
        raise ConfigError(f"{where} must declare its name: type: Literal['...'] = '...'")
    return kind


if TYPE_CHECKING:
    AnyRouter = RouterConfig
else:
    AnyRouter = Annotated[reduce(or_, known_routers()), Field(discriminator="type")]
