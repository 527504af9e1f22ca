"""Every built-in router keeps the contract, and `check_router` notices each way to break it."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from moetrain.config.da_moe import DAMoERouterConfig
from moetrain.config.moe import MoEConfig
from moetrain.config.routers import (
    BUILT_IN,
    BiasThresholdRouterConfig,
    ExpertBiasRouterConfig,
    ReLURouterConfig,
    TopKRouterConfig,
    TopPRouterConfig,
)
from moetrain.config.routing import RouterConfig
from moetrain.moe.routers.top_k import TopKRouter
from moetrain.moe.routing import RoutingContext, RoutingDecision, build_router
from moetrain.testing import check_router

ROUTERS: dict[str, RouterConfig] = {
    "top_k": TopKRouterConfig(),
    "top_1": TopKRouterConfig(top_k=1),
    "all experts": TopKRouterConfig(top_k=8),
    "renormalized": TopKRouterConfig(top_k=3, gates="renormalized"),
    "sigmoid": TopKRouterConfig(top_k=3, scores="sigmoid"),
    "groups": TopKRouterConfig(top_k=3, groups=4, top_groups=2),
    "groups by max": TopKRouterConfig(top_k=2, groups=8, top_groups=3, group_score="max"),
    "DeepSeek-V3": ExpertBiasRouterConfig(
        top_k=4, groups=4, top_groups=2, gates="renormalized", scaling_factor=2.5, bias_rate=0.1
    ),
    "expert_bias": ExpertBiasRouterConfig(scores="softmax"),
    "top_p": TopPRouterConfig(),
    "top_p, at most 3": TopPRouterConfig(threshold=0.9, max_k=3),
    "relu": ReLURouterConfig(),
    "relu, at most 3": ReLURouterConfig(max_k=3, l1_coeff_init=1e-3),
    "bias_threshold": BiasThresholdRouterConfig(),
    "bias_threshold, separate": BiasThresholdRouterConfig(rule="separate", max_k=4, bias_rate=0.1),
    "da_moe": DAMoERouterConfig(),
    "da_moe, predicted": DAMoERouterConfig(importance="predicted"),
    "da_moe, random by position": DAMoERouterConfig(importance="random", debias="position"),
    "da_moe, paper": DAMoERouterConfig(budget="paper", gates="renormalized", max_k=5),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_a_built_in_router_keeps_its_promises(name: str) -> None:
    check_router(ROUTERS[name])


@pytest.mark.parametrize("num_experts", [12, 64])
@pytest.mark.parametrize("settings", [kind() for kind in BUILT_IN], ids=lambda settings: settings.type)
def test_and_at_other_sizes(settings: RouterConfig, num_experts: int) -> None:
    check_router(settings, num_experts=num_experts, hidden_size=512)


def test_every_built_in_router_is_tried() -> None:
    assert {type(settings) for settings in ROUTERS.values()} == set(BUILT_IN)


@pytest.mark.parametrize("num_experts", [8, 20, 64])
@pytest.mark.parametrize("hidden_size", [512, 1024])
def test_no_token_s_score_depends_on_the_number_of_tokens(hidden_size: int, num_experts: int) -> None:
    moe = MoEConfig(num_experts=num_experts, ffn_hidden_size=4, router=TopKRouterConfig(scores="sigmoid"))
    router = build_router(moe, hidden_size, torch.float32, layer=0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, hidden_size, generator=generator)
    with torch.no_grad():
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator) * 0.05)
        whole = router(x, RoutingContext(100, 1, 100, 0, None))
        for tokens in range(1, 100):
            part = router(x[:tokens], RoutingContext(tokens, 1, tokens, 0, None))
            assert torch.equal(part.logits_TE, whole.logits_TE[:tokens])
            assert torch.equal(part.weights_TK, whole.weights_TK[:tokens])


# --- ways to break it ------------------------------------------------------------------------------------------------


class Broken(RouterConfig):
    """A router that goes wrong in the way that `how` names."""

    implementation = f"{__name__}:BrokenRouter"
    type: Literal["broken"] = "broken"
    how: str
    top_k: int = 2

    def selectable(self, num_experts: int) -> range:
        return range(1, 3) if self.how == "count" else range(self.top_k, self.top_k + 1)

    def describe(self, num_experts: int) -> str:
        return "" if self.how == "silent" else "two"

    @property
    def reported(self) -> tuple[str, ...]:
        return ("nothing",) if self.how == "reported" else ()

    @property
    def respects_token_mask(self) -> bool:
        return self.how == "sees hidden experts"

    @property
    def num_statistics(self) -> int:
        return int(self.how == "statistics")

    def problems(self, num_experts: int) -> list[str]:
        return [] if self.how == "credulous" or num_experts >= 2 else ["router.top_k (2) is too much"]


class BrokenRouter(TopKRouter):
    def __init__(self, moe: MoEConfig, hidden_size: int, dtype: torch.dtype, layer: int) -> None:
        self.how = moe.router.how  # pyright: ignore[reportAttributeAccessIssue]
        super().__init__(moe.model_copy(update={"router": TopKRouterConfig(top_k=2)}), hidden_size, dtype, layer)
        self.add_controller("seen", torch.zeros(()))
        self.last = 0.0

    def logits(self, x_TD: torch.Tensor, context: RoutingContext | None = None) -> torch.Tensor:
        if self.how == "blas":
            return x_TD.float() @ self.weight.float().t()
        if self.how == "batch norm":
            x_TD = x_TD - x_TD.mean(0, keepdim=True) if len(x_TD) else x_TD
        return super().logits(x_TD, None if self.how == "sees hidden experts" else context)

    def forward(self, x_TD: torch.Tensor, context: RoutingContext) -> RoutingDecision:
        decision = super().forward(x_TD, context)
        ids, weights, k = decision.expert_ids_TK, decision.weights_TK, decision.num_selected_T
        changes: dict[str, Any] = {}
        if self.how == "twice":
            changes = {"expert_ids_TK": ids[:, :1].expand(-1, 2)}
        elif self.how == "none":
            changes = {"expert_ids_TK": ids.clone().fill_(-1)}
        elif self.how == "count":
            changes = {"num_selected_T": torch.ones_like(k)}
        elif self.how == "out of range":
            changes = {"expert_ids_TK": torch.where(ids == 0, self.num_experts, ids)}
        elif self.how == "detached":
            changes = {"weights_TK": weights.detach()}
        elif self.how == "noise":
            changes = {"weights_TK": weights + torch.rand_like(weights)}
        elif self.how == "probs":
            changes = {"probs_TE": 2 * decision.probs_TE}
        elif self.how == "mean loss":
            changes = {"loss": decision.logits_TE.mean() if len(ids) else decision.logits_TE.sum()}
        elif self.how == "length":
            changes = {"weights_TK": weights * context.length}
        elif self.how == "moves":
            self.get_buffer("seen").add_(1)
        self.last = float(x_TD.sum())
        return RoutingDecision(**{**vars(decision), **changes})

    def update(self, counts: Any) -> None:
        if self.how == "local":
            self.get_buffer("seen").add_(self.last)
        elif self.how == "infinite":
            self.get_buffer("seen").fill_(float("inf"))
        elif self.how == "parameter":
            with torch.no_grad():
                self.weight.mul_(1.0 + self.last)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("silent", "describe"),
        ("credulous", "refuse 1 experts"),
        ("reported", "nothing"),
        ("statistics", "num_statistics says 1"),
        ("twice", "expert twice"),
        ("none", "first K slots"),
        ("count", "first K slots"),
        ("out of range", "below 8"),
        ("probs", "sum to one"),
        ("noise", "the same"),
        ("blas", "bits"),
        ("batch norm", "bits"),
        ("length", "bits"),
        ("mean loss", "mean_part"),
        ("detached", "no gradient"),
        ("sees hidden experts", "hidden from the token"),
        ("moves", "forward pass must not change seen"),
        ("local", "counts alone"),
        ("infinite", "finite"),
        ("parameter", "parameters alone"),
    ],
)
def test_a_broken_promise_is_noticed(how: str, told: str) -> None:
    with pytest.raises(AssertionError, match=told):
        check_router(Broken(how=how), hidden_size=512)


def test_a_router_that_its_task_cannot_teach_is_noticed() -> None:
    """Renormalized gates of one expert are always 1 (the GPT-2 code of HyperMoE routes so)."""
    with pytest.raises(AssertionError, match="weight through weights_TK is zero"):
        check_router(TopKRouterConfig(top_k=1, gates="renormalized"))


def test_settings_that_do_not_fit_are_told() -> None:
    with pytest.raises(AssertionError, match=r"router\.top_k \(9\) must not exceed num_experts \(8\)"):
        check_router(TopKRouterConfig(top_k=9))
