"""What a router's settings say to the rest of the program. No torch.

A router is two things: its settings, a `RouterConfig`, and the module that they name as `implementation`, a
`moetrain.moe.routing.Router`. A router of another package may keep both in one file. It is registered by one entry
point in the group `moetrain.routers`, whose value is the settings class; then its `type` is legal in every config.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

from moetrain.config.section import Section

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


def at_most_experts(router: RouterConfig, names: tuple[str, ...], num_experts: int) -> list[str]:
    """A sentence for each of the router's settings `names` that is set and exceeds `num_experts`."""
    values = {name: getattr(router, name) for name in names}
    return [
        f"router.{name} ({value}) must not exceed num_experts ({num_experts})"
        for name, value in values.items()
        if value is not None and value > num_experts
    ]
