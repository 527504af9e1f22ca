"""The settings of every router, told apart by `type`, and what the rest of the program may ask of them. No torch.

A router is two things: its settings, a `RouterConfig`, and the module that they name as `implementation`, a
`moetrain.moe.routing.Router`. A router of another package may keep both in one file. It is registered by one entry
point in the group `moetrain.routers`, whose value is the settings class; then its `type` is legal in every config.
"""

from __future__ import annotations

from functools import reduce
from importlib.metadata import EntryPoint, entry_points
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from moetrain.config.section import PositiveFloat, PositiveInt, Section
from moetrain.errors import ConfigError

CAUSAL_IMPORTANCE = ("self_weight", "row_max", "row_entropy")
NONCAUSAL_IMPORTANCE = ("col_max",)

Gates = Literal["raw", "renormalized"]


class RouterConfig(Section):
    """What all routers' settings have in common. The defaults suit a router that wants nothing special.

    Attributes:
        implementation: `module:Class` of the router.
    """

    implementation: ClassVar[str]

    type: str

    def selectable(self, num_experts: int) -> range:
        """The numbers of experts that a token may get."""
        raise NotImplementedError

    def expected_mean_k(self, num_experts: int) -> float:
        """Mean number of experts per token, or its upper bound where only training can tell."""
        return float(self.selectable(num_experts)[-1])

    def describe(self, num_experts: int) -> str:
        """In a few words, how many experts a token gets and what decides it: "top 2"."""
        raise NotImplementedError

    def problems(self, num_experts: int) -> list[str]:
        """What is wrong with these settings for a layer of `num_experts` experts, in sentences that begin with
        `router.` and the setting's name."""
        return []

    @property
    def attention_measure(self) -> str | None:
        """The statistic that the layer's attention computes for the router (`RoutingContext.importance_T`)."""
        return None

    @property
    def respects_token_mask(self) -> bool:
        """Whether the router never prefers an expert with a score of minus infinity to another one; it must hand its
        context to `Router.logits`, which puts the scores of hidden experts there."""
        return False

    @property
    def reported(self) -> tuple[str, ...]:
        """Names of scalar controllers that are shown in the metrics of each layer."""
        return ()

    @property
    def num_statistics(self) -> int:
        """Length of `RoutingDecision.statistics`."""
        return 0


class TopKRouterConfig(RouterConfig):
    """Every token goes to the same number of experts (Switch, GShard)."""

    implementation = "moetrain.moe.routers.top_k:TopKRouter"

    type: Literal["top_k"] = "top_k"
    top_k: PositiveInt = Field(default=2, description="experts per token")
    gates: Gates = Field(
        default="raw",
        description="weight of an expert: its softmax probability over all experts, or that probability divided by "
        "the sum over the selected ones (which gives the router no task gradient at top_k = 1)",
    )

    def selectable(self, num_experts: int) -> range:
        return range(self.top_k, self.top_k + 1)

    def describe(self, num_experts: int) -> str:
        return f"top {self.top_k}"

    def problems(self, num_experts: int) -> list[str]:
        return at_most_experts(self, ("top_k",), num_experts)

    @property
    def respects_token_mask(self) -> bool:
        return True


class DAMoERouterConfig(RouterConfig):
    """Attention gives each token an importance, and importance decides how many experts it gets (arXiv 2409.06669).

    `budget: paper` is the paper's K = ceil(I * num_experts). `budget: mean_k` is K = ceil(alpha * I) with a per-layer
    controller alpha that holds the mean K of a layer at `mean_k`, so that compute is fixed in advance.
    """

    implementation = "moetrain.moe.routers.da_moe:DAMoERouter"

    type: Literal["da_moe"] = "da_moe"
    importance: Literal["self_weight", "row_max", "row_entropy", "col_max"] = Field(
        default="self_weight", description="attention statistic, averaged over heads; col_max looks at the future"
    )
    budget: Literal["mean_k", "paper"] = "mean_k"
    mean_k: PositiveFloat = Field(default=2.0, description="target mean number of experts per token (budget: mean_k)")
    min_k: PositiveInt = 1
    max_k: PositiveInt | None = Field(
        default=None, description="the most experts a token may get; default: num_experts"
    )
    controller_rate: PositiveFloat = Field(
        default=0.3, description="step size of log(alpha) per relative error of mean K"
    )
    gates: Gates = "raw"

    @model_validator(mode="after")
    def _budget_is_reachable(self) -> DAMoERouterConfig:
        top = self.max_k if self.max_k is not None else float("inf")
        if self.min_k > top:
            raise ValueError(f"min_k ({self.min_k}) must not exceed max_k ({self.max_k})")
        if self.budget == "mean_k" and not self.min_k <= self.mean_k <= top:
            raise ValueError(f"mean_k ({self.mean_k}) must lie between min_k ({self.min_k}) and max_k ({self.max_k})")
        return self

    def selectable(self, num_experts: int) -> range:
        return range(self.min_k, (self.max_k or num_experts) + 1)

    def expected_mean_k(self, num_experts: int) -> float:
        return self.mean_k if self.budget == "mean_k" else super().expected_mean_k(num_experts)

    def describe(self, num_experts: int) -> str:
        choice = f"{self.mean_k:g} on average" if self.budget == "mean_k" else f"ceil(importance x {num_experts})"
        return f"by {self.importance}, {choice}, at most {self.selectable(num_experts)[-1]}"

    def problems(self, num_experts: int) -> list[str]:
        names = ("min_k", "max_k", "mean_k") if self.budget == "mean_k" else ("min_k", "max_k")
        return at_most_experts(self, names, num_experts)

    @property
    def attention_measure(self) -> str | None:
        return self.importance

    @property
    def respects_token_mask(self) -> bool:
        return True

    @property
    def reported(self) -> tuple[str, ...]:
        return ("log_alpha",) if self.budget == "mean_k" else ()


def at_most_experts(router: RouterConfig, names: tuple[str, ...], num_experts: int) -> list[str]:
    """A sentence for each of the router's settings `names` that is set and exceeds `num_experts`."""
    values = {name: getattr(router, name) for name in names}
    return [
        f"router.{name} ({value}) must not exceed num_experts ({num_experts})"
        for name, value in values.items()
        if value is not None and value > num_experts
    ]


BUILT_IN: tuple[type[RouterConfig], ...] = (TopKRouterConfig, DAMoERouterConfig)
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
