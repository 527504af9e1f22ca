"""DA-MoE from importance to output, against the equations in NumPy float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from moetrain.config.da_moe import DAMoERouterConfig, rank_shares
from moetrain.config.moe import MoEConfig
from moetrain.moe.routers.da_moe import DAMoERouter
from moetrain.moe.routing import RoutingContext, RoutingDecision
from moetrain.moe.telemetry import RouterCounts

S, B, D, E = 17, 3, 6, 8
Array = np.ndarray


def make(settings: dict, seed: int = 0) -> DAMoERouter:
    config = MoEConfig(num_experts=E, ffn_hidden_size=4, router=DAMoERouterConfig(**settings))
    router = DAMoERouter(config, D, torch.float32, layer=2)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if router.settings.has_thresholds:
            # Some state of a training: thresholds that differ between buckets.
            router.thresholds.copy_(torch.randn(router.thresholds.shape, generator=generator).sort(dim=1).values)
    return router


def run(router: DAMoERouter, x: torch.Tensor, importance: torch.Tensor | None) -> RoutingDecision:
    return router(x, RoutingContext(S, B, S, 0, importance))


def tokens(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and importances, also 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(S * B, generator=generator)
    importance[0], importance[1] = 0.0, 1.0
    return torch.randn(S * B, D, generator=generator), importance


# --- the equations -----------------------------------------------------------------------------------------------


def softmax(z: Array) -> Array:
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def counts_of(router: DAMoERouter, importance: Array) -> list[int]:
    """K of tokens in the order of [S, B], one at a time."""
    s, result = router.settings, []
    for t, value in enumerate(importance):
        position = t // B
        if s.budget == "paper":
            result.append(min(max(math.ceil(float(np.float32(value) * np.float32(E))), s.min_k), s.max_k or E))
        elif s.debias == "position" and position == 0:
            result.append(round(s.mean_k + 1e-9))
        else:
            row = router.thresholds[(position + 1).bit_length() - 1 if s.debias == "position" else 0].double().numpy()
            with np.errstate(divide="ignore"):
                odds = np.log(value) - np.log1p(-value) if s.importance != "col_sum" else np.log(value)
            reached = odds >= row if s.direction == "high" else -odds >= row
            result.append(s.min_k + int(reached.sum()))
    return result


def weights_of(p: Array, counts: list[int], renormalized: bool) -> Array:
    """Gates [T, E], zero where an expert was not chosen."""
    ranks = (-p).argsort(-1, kind="stable").argsort(-1, kind="stable")
    weights = np.where(ranks < np.array(counts)[:, None], p, 0.0)
    return weights / weights.sum(-1, keepdims=True) if renormalized else weights


def gradients_of(
    x: Array, gate: Array, experts: Array, counts: list[int], renormalized: bool, seed: Array
) -> tuple[Array, Array, Array, Array]:
    """y = sum_e w_e A_e x for linear experts A, and the gradients of seed . y to x, the gate and the experts.

    With v_e = seed . A_e x: d/d logit_e of sum_S p_e v_e is p_e (1[e in S] v_e - sum_S p v), and of
    sum_S p_e v_e / sum_S p_e it is w_e (v_e - sum_S w v).
    """
    p = softmax(x @ gate.T)
    w = weights_of(p, counts, renormalized)
    applied = np.einsum("ekd,td->tek", experts, x)
    v = np.einsum("tk,tek->te", seed, applied)
    mean = (w * v).sum(-1, keepdims=True)
    d_logits = w * (v - mean) if renormalized else w * v - p * mean
    d_x = d_logits @ gate + np.einsum("te,ekd,tk->td", w, experts, seed)
    return np.einsum("te,tek->tk", w, applied), d_x, d_logits.T @ x, np.einsum("te,tk,td->ekd", w, seed, x)


MEASURES = ("self_weight", "row_max", "row_entropy", "col_max", "col_sum", "predicted")
BUDGETS = [
    {"budget": "paper"},
    {"budget": "paper", "min_k": 2, "max_k": 5},
    {"mean_k": 2.0},
    {"mean_k": 2.5, "direction": "low"},
    {"mean_k": 2.5, "debias": "position"},
    {"mean_k": 3.0, "min_k": 2, "max_k": 4, "debias": "position", "direction": "low"},
]


CASES = [(m, b) for m in MEASURES for b in BUDGETS if not (m == "col_sum" and b.get("budget") == "paper")]


@pytest.mark.parametrize("gates", ["raw", "renormalized"])
@pytest.mark.parametrize(("measure", "budget"), CASES, ids=str)
def test_counts_outputs_and_gradients_are_those_of_the_equations(measure: str, budget: dict, gates: str) -> None:
    router = make({"importance": measure, "gates": gates, **budget})
    x, importance = tokens()
    if measure == "col_sum":
        importance = importance * 5
    x.requires_grad_()
    experts = torch.randn(E, D, D, generator=torch.Generator().manual_seed(5)).requires_grad_()
    seed = torch.randn(x.shape, generator=torch.Generator().manual_seed(6))
    decision = run(router, x, importance)
    chosen = experts[decision.expert_ids_TK.clamp(min=0)]
    y = (decision.weights_TK[..., None] * torch.einsum("tkde,te->tkd", chosen, x)).sum(1)
    (y * seed).sum().backward()

    xs, gate, ws = (np.array(t.detach().double()) for t in (x, router.weight, experts))
    if measure == "predicted":
        known = 1 / (1 + np.exp(-(xs @ router.predictor.detach().double().numpy())))
    else:
        known = importance.double().numpy()
    counts = counts_of(router, known)
    assert decision.num_selected_T.tolist() == counts
    assert len(set(counts)) > 1
    expected = gradients_of(xs, gate, ws, counts, gates == "renormalized", seed.double().numpy())
    for mine, theirs in zip((y.detach(), x.grad, router.weight.grad, experts.grad), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5, rtol=1e-4)


def test_the_hand_derived_gradients_are_those_of_the_equations() -> None:
    """Central differences in float64, for the oracle above."""
    generator = np.random.default_rng(0)
    x, gate, experts = generator.normal(size=(3, 4)), generator.normal(size=(5, 4)), generator.normal(size=(5, 4, 4))
    seed, counts = generator.normal(size=(3, 4)), [1, 3, 5]
    for renormalized in (False, True):
        expected = gradients_of(x, gate, experts, counts, renormalized, seed)[1:]
        for value, gradient in zip((x, gate, experts), expected, strict=True):
            for index in np.ndindex(value.shape):
                kept, outputs = value[index], []
                for step in (1e-6, -1e-6):
                    value[index] = kept + step
                    outputs.append((gradients_of(x, gate, experts, counts, renormalized, seed)[0] * seed).sum())
                value[index] = kept
                assert (outputs[0] - outputs[1]) / 2e-6 == pytest.approx(gradient[index], abs=1e-6)


def test_the_predictor_learns_by_cross_entropy_and_its_loss_reaches_nothing_else() -> None:
    router = make({"importance": "predicted", "predictor_loss_coeff": 0.5})
    x, ranks = tokens()
    x.requires_grad_()
    decision = run(router, x, ranks)
    assert decision.loss is not None
    decision.loss.backward()
    xs, w, r = x.detach().double().numpy(), router.predictor.detach().double().numpy(), ranks.double().numpy()
    guess = 1 / (1 + np.exp(-(xs @ w)))
    loss = 0.5 * -(r * np.log(guess) + (1 - r) * np.log(1 - guess)).mean()
    assert decision.loss.item() == pytest.approx(loss, rel=1e-5)
    np.testing.assert_allclose(router.predictor.grad, 0.5 * (guess - r) @ xs / len(r), atol=1e-6)
    assert x.grad is None
    assert router.weight.grad is None


def test_a_predictor_needs_its_teacher_in_training_only_and_never_routes_by_it() -> None:
    router = make({"importance": "predicted"})
    x, ranks = tokens()
    taught, other = run(router, x, ranks), run(router, x, 1 - ranks)
    assert torch.equal(taught.expert_ids_TK, other.expert_ids_TK)
    assert taught.loss is not None and other.loss is not None and taught.loss.item() != other.loss.item()
    untaught = run(router.eval(), x, None)
    assert untaught.loss is None
    assert torch.equal(taught.expert_ids_TK, untaught.expert_ids_TK)


def test_random_importance_is_uniform_repeatable_and_without_relation_to_neighbors() -> None:
    router = make({"importance": "random"})
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, D, generator=generator)
    context = RoutingContext(1000, 4, 1000, 0, None)
    u, _ = router.importance(x, context)
    assert torch.equal(u, router.importance(x.clone(), context)[0])
    histogram = torch.histc(u, bins=10, min=0, max=1)
    assert (histogram - 400).abs().max() < 5 * 20  # five standard deviations
    assert abs(float(torch.corrcoef(torch.stack([u[:-4], u[4:]]))[0, 1])) < 0.08
    changed = x.clone()
    changed[17] = torch.randn(D, generator=generator)
    same = router.importance(changed, context)[0] == u
    assert not same[17]
    assert same.sum() == 3999


def test_statistics_count_tokens_and_what_reaches_thresholds_per_bucket() -> None:
    router = make({"debias": "position", "mean_k": 2.5})
    x, importance = tokens()
    decision = run(router, x, importance)
    assert decision.statistics is not None
    rows = decision.statistics.view(16, -1)
    assert rows[:, 0].tolist() == [1 * B, 2 * B, 4 * B, 8 * B, 2 * B] + [0.0] * 11
    edges = torch.cat([router.thresholds, router.quartiles], dim=1).sigmoid()
    for t, value in enumerate(importance):
        bucket = (t // B + 1).bit_length() - 1
        rows[bucket, 1:] -= (value >= edges[bucket]).double()
    assert not rows[:, 1:].any()
    assert run(router.eval(), x, importance).statistics is None


# --- the budget --------------------------------------------------------------------------------------------------


def importances(kind: str, step: int, generator: torch.Generator, length: int, sequences: int) -> torch.Tensor:
    """[T] of some distribution that attention may have."""
    normal = torch.randn(length, sequences, generator=generator)
    visible = torch.arange(1, length + 1)[:, None]
    values = {
        "broad": lambda: normal.sigmoid(),
        "nearly equal": lambda: 1 - 5e-5 * (0.2 * normal).exp(),
        "by position": lambda: ((0.3 * normal).exp() / visible).clamp(max=1),
        "drifting": lambda: (0.3 * normal - 5 + 0.03 * step).sigmoid(),
    }[kind]()
    if kind == "by position":
        values[0] = 1.0
    return values.flatten()


@pytest.mark.parametrize("kind", ["broad", "nearly equal", "by position", "drifting"])
@pytest.mark.parametrize("settings", [{}, {"direction": "low"}, {"debias": "position"}, {"max_k": 3}], ids=str)
@pytest.mark.parametrize("mean_k", [1.2, 2.0, 2.5])
def test_mean_k_is_the_budget_after_a_warm_up(kind: str, settings: dict, mean_k: float) -> None:
    length, sequences, generator = 64, 8, torch.Generator().manual_seed(0)
    router = make({"mean_k": mean_k, **settings})
    means = []
    for step in range(120):
        importance = importances(kind, step, generator, length, sequences)
        positions = torch.arange(length).repeat_interleave(sequences)
        counts, statistics = router.count(importance, positions)
        assert statistics is not None
        router.update(RouterCounts([], torch.bincount(counts).tolist(), 0.0, 0.0, statistics.tolist(), None))
        means.append(float(counts.double().mean()))
    assert abs(sum(means[50:]) / 70 / mean_k - 1) < 0.01
    # Nor does it swing between two counts where importances lie close together.
    assert max(abs(mean - mean_k) for mean in means[70:]) < 0.35


@pytest.mark.parametrize("mean_k", [1.0, 1.2, 2.0, 2.5, 3.7, 6.0, 8.0])
@pytest.mark.parametrize("limits", [(1, 8), (1, 64), (2, 8)])
def test_rank_shares_give_the_mean_and_are_those_of_a_scaled_rank(mean_k: float, limits: tuple[int, int]) -> None:
    min_k, max_k = limits
    if mean_k < min_k:
        return
    shares = rank_shares(mean_k, min_k, max_k)
    assert min_k + sum(shares) == pytest.approx(mean_k, abs=1e-6)
    assert len(shares) <= max_k - min_k
    assert list(shares) == sorted(shares, reverse=True)
    if len(shares) > 0 and mean_k < max_k:
        alpha = min_k / (1 - shares[0])
        ranks = (np.arange(20000) + 0.5) / 20000
        counts = np.clip(np.ceil(alpha * ranks), min_k, max_k)
        assert counts.mean() == pytest.approx(mean_k, abs=2e-3)


def test_a_budget_at_its_limits_gives_every_token_the_same() -> None:
    for settings, k in (({"mean_k": 1.0}, 1), ({"mean_k": 8.0}, 8), ({"mean_k": 3.0, "min_k": 3}, 3)):
        x, importance = tokens()
        router = make(settings)
        if router.settings.has_thresholds:
            router = DAMoERouter(
                MoEConfig(num_experts=E, ffn_hidden_size=4, router=router.settings), D, torch.float32, layer=0
            )
        assert set(run(router, x, importance).num_selected_T.tolist()) == {k}


def test_positions_never_trained_are_ranked_like_the_last_trained_ones() -> None:
    router = make({"debias": "position"})
    fresh = DAMoERouter(MoEConfig(num_experts=E, ffn_hidden_size=4, router=router.settings), D, torch.float32, layer=0)
    for step in range(3):
        importance = torch.rand(S * B, generator=torch.Generator().manual_seed(step))
        counts, statistics = fresh.count(importance, torch.arange(S).repeat_interleave(B))
        assert statistics is not None
        fresh.update(RouterCounts([], torch.bincount(counts).tolist(), 0.0, 0.0, statistics.tolist(), None))
    assert fresh.visits.tolist() == [0.0, 3.0, 3.0, 3.0, 3.0] + [0.0] * 11
    assert (fresh.thresholds[5:] == fresh.thresholds[4]).all()
    assert not torch.equal(fresh.thresholds[3], fresh.thresholds[4])


# --- what the settings refuse ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": "paper", "direction": "low"}, "direction .low. has no effect"),
        ({"budget": "paper", "debias": "position"}, "debias .position. has no effect"),
        ({"budget": "paper", "mean_k": 3.0}, "mean_k .3.0. has no effect: budget .paper."),
        ({"budget": "paper", "controller_rate": 0.1}, "controller_rate .0.1. has no effect: budget .paper."),
        ({"budget": "paper", "importance": "col_sum"}, "col_sum. is no share"),
        ({"teacher": "received"}, "teacher .received. has no effect: importance .self_weight. learns nothing"),
        ({"predictor_loss_coeff": 0.1}, "predictor_loss_coeff"),
        ({"controller_rate": 0.0}, "controller_rate"),
        ({"controller_rate": 1.5}, "controller_rate"),
        ({"min_k": 3, "max_k": 2}, "must not exceed max_k"),
        ({"mean_k": 5, "max_k": 4}, "must lie between"),
    ],
)
def test_settings_that_would_do_nothing_or_cannot_be_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DAMoERouterConfig(**settings)
