"""How many experts a token gets, which, and with what weight."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.config.da_moe import DAMoERouterConfig
from moetrain.config.moe import MoEConfig
from moetrain.config.routers import TopKRouterConfig
from moetrain.moe.routing import Router, RoutingContext, RoutingDecision, build_router

D, E = 6, 8


def router(config: TopKRouterConfig | DAMoERouterConfig) -> Router:
    layer = build_router(MoEConfig(num_experts=E, ffn_hidden_size=4, router=config), D, torch.float32, layer=0)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(E, D, generator=torch.Generator().manual_seed(0)))
    return layer


def route(config: TopKRouterConfig | DAMoERouterConfig, importance: torch.Tensor | None) -> RoutingDecision:
    tokens = 32 if importance is None else len(importance)
    return router(config)(
        torch.randn(tokens, D, generator=torch.Generator().manual_seed(1)), context(importance, tokens)
    )


def context(importance: torch.Tensor | None, tokens: int) -> RoutingContext:
    return RoutingContext(local_length=tokens, sequences=1, length=tokens, start=0, importance_T=importance)


@pytest.mark.parametrize("gates", ["raw", "renormalized"])
@pytest.mark.parametrize(
    "config",
    [TopKRouterConfig(top_k=3), DAMoERouterConfig(mean_k=2.0), DAMoERouterConfig(budget="paper", max_k=4)],
    ids=["top_k", "mean_k", "paper"],
)
def test_a_token_gets_its_best_experts_and_their_probabilities(config, gates: str) -> None:
    config = config.model_copy(update={"gates": gates})
    importance = torch.linspace(0, 1, 32)
    decision = route(config, importance)
    for t in range(32):
        k = int(decision.num_selected_T[t])
        ids, weights = decision.expert_ids_TK[t].tolist(), decision.weights_TK[t]
        best = decision.probs_TE[t].argsort(descending=True)[:k].tolist()
        assert ids[:k] == best
        assert set(ids[k:]) <= {-1}
        assert not weights[k:].any()
        expected = decision.probs_TE[t][best]
        if gates == "renormalized":
            expected = expected / expected.sum()
        torch.testing.assert_close(weights[:k], expected)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=20), st.integers(1, E), st.integers(0, E))
def test_the_papers_count_is_the_ceiling_of_importance_times_experts(values, min_k: int, extra: int) -> None:
    max_k = min(E, min_k + extra)
    config = DAMoERouterConfig(budget="paper", min_k=min_k, max_k=max_k)
    importance = torch.tensor(values)
    expected = [min(max(math.ceil(float(i * E)), min_k), max_k) for i in importance]
    assert route(config, importance).num_selected_T.tolist() == expected


def test_renormalized_gates_of_one_expert_give_the_router_no_gradient_and_raw_ones_do() -> None:
    for gates, zero in (("renormalized", True), ("raw", False)):
        layer = router(TopKRouterConfig(top_k=1, gates=gates))
        decision = layer(torch.randn(16, D, generator=torch.Generator().manual_seed(2)), context(None, 16))
        decision.weights_TK.square().sum().backward()
        assert layer.weight.grad is not None
        assert (layer.weight.grad.abs().max().item() < 1e-6) == zero


def test_importance_itself_gets_no_gradient() -> None:
    importance = torch.rand(8).requires_grad_()
    decision = route(DAMoERouterConfig(mean_k=2.0), importance)
    assert decision.weights_TK.requires_grad
    (gradient,) = torch.autograd.grad(decision.weights_TK.sum(), importance, allow_unused=True)
    assert gradient is None


def test_no_token_is_a_legal_batch() -> None:
    # At a mean of two, ranks give at most three experts.
    decision = route(DAMoERouterConfig(mean_k=2.0), torch.empty(0))
    assert decision.expert_ids_TK.shape == (0, 3)
