"""The settings of every router, told apart by `type`: our own, and those that other packages register. No torch."""

from __future__ import annotations

from functools import reduce
from importlib.metadata import EntryPoint, entry_points
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from moetrain.config.da_moe import DAMoERouterConfig
from moetrain.config.routing import Gates, RouterConfig, at_most_experts
from moetrain.config.section import NonNegativeFloat, PositiveFloat, PositiveInt
from moetrain.errors import ConfigError


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
    mean_over: Literal["model", "layer"] = Field(
        default="model",
        description="whose mean K is held at `mean_k`: that of all layers together (as published) or each layer's own; "
        "the penalty only lowers K, so a layer whose gate shuts by itself stays below a budget of its own",
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
        raise ConfigError(f"{where} must be a subclass of moetrain.config.routing.RouterConfig")
    if not isinstance(kind.model_fields["type"].default, str):
        raise ConfigError(f"{where} must declare its name: type: Literal['...'] = '...'")
    return kind


if TYPE_CHECKING:
    AnyRouter = RouterConfig
else:
    AnyRouter = Annotated[reduce(or_, known_routers()), Field(discriminator="type")]
