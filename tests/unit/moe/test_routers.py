"""Each router against its equations in NumPy float64, written from the sources; and what their controllers achieve."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moetrain.config.moe import MoEConfig
from moetrain.config.routers import (
    BiasThresholdRouterConfig,
    ExpertBiasRouterConfig,
    ReLURouterConfig,
    TopKRouterConfig,
    TopPRouterConfig,
)
from moetrain.config.routing import RouterConfig
from moetrain.moe.losses import RouterLosses
from moetrain.moe.routing import Router, RoutingContext, RoutingDecision, build_router
from moetrain.moe.telemetry import RouterCounts

D, E, S, B = 6, 8, 9, 2
T = S * B
CONTEXT = RoutingContext(S, B, S, 0, None)
COEFF = {"aux_loss_coeff": 0.2, "z_loss_coeff": 0.1}

ROUTERS: dict[str, RouterConfig] = {
    "sigmoid": TopKRouterConfig(top_k=3, scores="sigmoid", scaling_factor=2.5),
    "sigmoid renormalized": TopKRouterConfig(top_k=3, scores="sigmoid", gates="renormalized"),
    "groups": TopKRouterConfig(top_k=3, groups=4, top_groups=2),
    "groups by max": TopKRouterConfig(top_k=3, groups=2, top_groups=1, group_score="max", gates="renormalized"),
    "DeepSeek-V3": ExpertBiasRouterConfig(top_k=3, groups=4, top_groups=2, gates="renormalized", scaling_factor=2.5),
    "top_p": TopPRouterConfig(threshold=0.6, entropy_loss_coeff=0.3),
    "top_p, at most 2": TopPRouterConfig(threshold=0.9, max_k=2, entropy_loss_coeff=0.3),
    "relu": ReLURouterConfig(l1_coeff_init=0.5),
    "relu, at most 2": ReLURouterConfig(l1_coeff_init=0.5, mean_k=1.5, max_k=2),
    "bias_threshold": BiasThresholdRouterConfig(),
    "bias_threshold, at most 3": BiasThresholdRouterConfig(max_k=3, rule="separate"),
}


class _Alone:
    """A group of one rank."""

    def size(self) -> int:
        return 1


def build(settings: RouterConfig, hidden_size: int = D, num_experts: int = E) -> tuple[Router, RouterLosses]:
    moe = MoEConfig(num_experts=num_experts, ffn_hidden_size=4, router=settings, **COEFF)
    router = build_router(moe, hidden_size, torch.float32, layer=0)
    return router, RouterLosses(moe, _Alone())  # pyright: ignore[reportArgumentType]


def some_case(settings: RouterConfig) -> tuple[Router, RouterLosses, torch.Tensor, np.ndarray]:
    """Router, losses, tokens of which some are such that no score is positive, and a use for each gate."""
    router, losses = build(settings)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        router.weight.copy_(torch.randn(E, D, generator=generator) * 0.6 + 0.5)
        for name, controller in router.controllers():
            if name == "bias":
                controller.add_(torch.randn(E, generator=generator) * 0.1)
    x = torch.randn(T, D, generator=generator)
    x[:3] -= 2.0  # against what all rows of the gate have in common
    use = torch.randn(T, E, generator=generator, dtype=torch.float64).numpy()
    return router, losses, x, use


# --- the equations ---------------------------------------------------------------------------------------------------


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def best(order: np.ndarray, count: int) -> list[int]:
    return sorted(range(len(order)), key=lambda e: -order[e])[:count]


def allowed(order: np.ndarray, settings: TopKRouterConfig | ExpertBiasRouterConfig) -> list[int]:
    """The experts of the best groups."""
    size = E // settings.groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(settings.groups)]
    take = 2 if settings.group_score == "top2_sum" else 1
    worth = np.array([sum(sorted((order[e] for e in group), reverse=True)[:take]) for group in members])
    return [e for g in best(worth, settings.top_groups or settings.groups) for e in members[g]]


def choose(settings: RouterConfig, logits: np.ndarray, bias: np.ndarray) -> list[int]:
    """The experts of one token."""
    if isinstance(settings, TopKRouterConfig | ExpertBiasRouterConfig):
        order = (sigmoid(logits) if settings.scores == "sigmoid" else softmax(logits)) + bias
        legal = allowed(order, settings)
        return best(np.array([order[e] if e in legal else -np.inf for e in range(E)]), settings.top_k)
    if isinstance(settings, TopPRouterConfig):
        p, chosen, total = softmax(logits), [], 0.0
        for e in best(p, settings.max_k or E):
            chosen.append(e)
            total += p[e]
            if total > settings.threshold:
                break
        return chosen
    if isinstance(settings, ReLURouterConfig):
        return best(logits, min(max(int((logits > 0).sum()), 1), settings.max_k or E))
    assert isinstance(settings, BiasThresholdRouterConfig)
    margin = sigmoid(logits) + bias
    return best(margin, min(max(int((margin > 0).sum()), 1), settings.max_k or E))


def gates(settings: RouterConfig, logits: np.ndarray, chosen: list[int], at: np.ndarray) -> np.ndarray:
    """[E] weights of one token. `at`: the logits where gradients are taken; only straight-through gates need them."""
    result = np.zeros(E)
    if isinstance(settings, TopKRouterConfig | ExpertBiasRouterConfig):
        score = sigmoid(logits) if settings.scores == "sigmoid" else softmax(logits)
        result[chosen] = score[chosen] / (score[chosen].sum() if settings.gates == "renormalized" else 1.0)
        return result * settings.scaling_factor
    if isinstance(settings, ReLURouterConfig):
        result[chosen] = np.maximum(logits, 0)[chosen] if (at > 0).any() else (logits - at)[chosen]
        return result
    result[chosen] = (softmax(logits) if isinstance(settings, TopPRouterConfig) else sigmoid(logits))[chosen]
    return result


def objective(settings: RouterConfig, w: np.ndarray, w0: np.ndarray, x: np.ndarray, bias: np.ndarray, use: np.ndarray):
    """Sum of the gates' uses and all losses at `w`, with every choice and load as at `w0`; and the gates."""
    logits, at = x @ w.T, x @ w0.T
    chosen = [choose(settings, row, bias) for row in at]
    gate = np.stack([gates(settings, *row) for row in zip(logits, chosen, at, strict=True)])
    picked = np.array([[float(e in c) for e in range(E)] for c in chosen])
    sigmoids = isinstance(settings, BiasThresholdRouterConfig) or getattr(settings, "scores", "") == "sigmoid"
    probs = sigmoid(logits) / sigmoid(logits).sum(-1, keepdims=True) if sigmoids else softmax(logits)
    total = (gate * use).sum()
    for b in range(B):  # tokens are in the order of [S, B]
        load = picked[b::B].mean(0)
        total += 0.2 * E * (load / load.sum() * probs[b::B].mean(0)).sum() / B
        if isinstance(settings, ReLURouterConfig):
            l1 = settings.l1_coeff_init / settings.mean_k
            total += l1 * E * (load * np.maximum(logits, 0)[b::B].mean(0)).sum() / B
    total += 0.1 * (np.log(np.exp(logits).sum(-1)) ** 2).mean()
    if isinstance(settings, TopPRouterConfig):
        p = softmax(logits)
        total += settings.entropy_loss_coeff * -(p * np.log(p)).sum(-1).mean()
    return total, gate, probs


def dense(decision: RoutingDecision) -> torch.Tensor:
    """Weights by expert, [T, E]."""
    ids = decision.expert_ids_TK
    return torch.zeros(T, E + 1).scatter(1, torch.where(ids < 0, E, ids), decision.weights_TK)[:, :E]


@pytest.mark.parametrize("name", ROUTERS)
def test_gates_losses_and_gradients_are_those_of_the_equations(name: str) -> None:
    settings = ROUTERS[name]
    router, losses, x, use = some_case(settings)
    bias = dict(router.controllers()).get("bias", torch.zeros(E)).double().numpy()
    decision = router(x, CONTEXT)
    loss = (dense(decision).double() * torch.from_numpy(use)).sum() + losses(decision, CONTEXT).total.double()
    loss.backward()

    w = router.weight.detach().double().numpy()
    x64 = x.double().numpy()
    expected, gate, probs = objective(settings, w, w, x64, bias, use)
    np.testing.assert_allclose(dense(decision).detach().numpy(), gate, atol=1e-6)
    np.testing.assert_allclose(decision.probs_TE.detach().numpy(), probs, atol=1e-6)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    gradient = np.zeros_like(w)
    for index in np.ndindex(w.shape):
        moved = [w.copy(), w.copy()]
        moved[0][index] += 1e-6
        moved[1][index] -= 1e-6
        above, below = (objective(settings, m, w, x64, bias, use)[0] for m in moved)
        gradient[index] = (above - below) / 2e-6
    assert router.weight.grad is not None
    np.testing.assert_allclose(router.weight.grad.numpy(), gradient, rtol=2e-4, atol=2e-5)


def test_the_cases_hold_what_makes_them_hard() -> None:
    counts = {name: some_case(s)[0](some_case(s)[2], CONTEXT).num_selected_T for name, s in ROUTERS.items()}
    for name in ("top_p", "relu", "bias_threshold"):
        assert len(set(counts[name].tolist())) >= 3, name
    router, _, x, _ = some_case(ROUTERS["relu"])
    decision = router(x, CONTEXT)
    dead = (decision.logits_TE <= 0).all(-1)
    assert 1 <= int(dead.sum()) < T
    assert not decision.weights_TK[dead].any()
    assert (decision.num_selected_T[dead] == 1).all()
    plain, limited = (
        router_of(x, CONTEXT).expert_ids_TK
        for router_of in (some_case(TopKRouterConfig(top_k=3))[0], some_case(ROUTERS["groups"])[0])
    )
    assert not torch.equal(plain, limited)


def test_a_bias_changes_the_choice_and_no_weight_s_value() -> None:
    router, _, x, _ = some_case(ExpertBiasRouterConfig(top_k=2))
    with torch.no_grad():
        router.get_buffer("bias").copy_(torch.tensor([0, 0, 0, 0, 0, 0, 0, 9.0]))
    decision = router(x, CONTEXT)
    assert (decision.expert_ids_TK[:, 0] == 7).all()
    torch.testing.assert_close(decision.weights_TK[:, 0], decision.logits_TE[:, 7].sigmoid())


def test_masked_groups_stay_masked_under_negative_biases() -> None:
    """Some code fills masked scores with 0, which beats a score that a bias has made negative."""
    router, _, x, _ = some_case(ExpertBiasRouterConfig(top_k=4, groups=2, top_groups=1))
    with torch.no_grad():
        router.get_buffer("bias").fill_(-5.0)
    groups = router(x, CONTEXT).expert_ids_TK // 4
    assert (groups == groups[:, :1]).all()


# --- controllers -----------------------------------------------------------------------------------------------------


def counts_of(decision: RoutingDecision, num_experts: int) -> RouterCounts:
    ids = decision.expert_ids_TK
    loads = torch.bincount(ids[ids >= 0], minlength=num_experts).tolist()
    return RouterCounts(loads, torch.bincount(decision.num_selected_T).tolist(), 0.0, 0.0, [], None)


def test_biases_move_by_the_sign_of_the_load_error() -> None:
    router, _ = build(ExpertBiasRouterConfig(bias_rate=0.5))
    router.update(RouterCounts([10, 2, 4, 4, 4, 4, 4, 0], [0, 0, 16], 0.0, 0.0, [], None))
    assert router.get_buffer("bias").tolist() == [-0.5, 0.5, 0, 0, 0, 0, 0, 0.5]


def test_thresholds_move_by_both_published_rules() -> None:
    start = build(BiasThresholdRouterConfig(mean_k=2.0))[0].get_buffer("bias").clone()
    counts = RouterCounts([10, 2, 4, 4, 4, 4, 4, 0], [0, 0, 16], 0.0, 0.0, [], None)  # the budget is met
    joint, separate = (
        build(BiasThresholdRouterConfig(mean_k=2.0, rule=rule, bias_rate=0.5))[0] for rule in ("joint", "separate")
    )
    joint.update(counts)
    sign = torch.tensor([1.0, -1, 0, 0, 0, 0, 0, -1])
    torch.testing.assert_close(joint.get_buffer("bias"), start - 0.5 * (sign + 1 / 8))
    separate.update(counts)
    torch.testing.assert_close(separate.get_buffer("bias"), start - 0.5 * sign)
    below = build(BiasThresholdRouterConfig(mean_k=3.0, bias_rate=0.5))[0]
    start = below.get_buffer("bias").clone()
    below.update(counts)
    torch.testing.assert_close(below.get_buffer("bias"), start - 0.5 * (sign + 1 / 8 - 1))


def test_the_penalty_rises_while_too_many_experts_run_and_stays_in_its_bounds() -> None:
    router, _ = build(ReLURouterConfig(mean_k=2.0, controller="sign"))
    many, few = (RouterCounts([8] * 8, histogram, 0.0, 0.0, [], None) for histogram in ([0, 0, 0, 9], [0, 9]))
    router.update(few)
    assert router.get_buffer("log_l1_coeff").item() == pytest.approx(math.log(1e-8))
    router.update(many)
    assert router.get_buffer("log_l1_coeff").item() == pytest.approx(math.log(1.2e-8))
    for _ in range(500):
        router.update(many)
    assert router.get_buffer("log_l1_coeff").item() == pytest.approx(math.log(1e3))


def test_the_penalty_moves_by_the_relative_error_and_at_most_one_whole_step() -> None:
    for mean, moved in (
        (2.5, math.log(1.2) * math.log(1.25)),
        (8.0, math.log(1.2)),
        (1.5, math.log(1.2) * math.log(0.75)),
    ):
        router, _ = build(ReLURouterConfig(mean_k=2.0))
        with torch.no_grad():
            router.get_buffer("log_l1_coeff").fill_(-3.0)
        histogram = [0] * 9
        histogram[math.floor(mean)] += 1
        histogram[math.ceil(mean)] += 1
        router.update(RouterCounts([1] * 8, histogram, 0.0, 0.0, [], None))
        assert router.get_buffer("log_l1_coeff").item() == pytest.approx(-3.0 + moved)


def test_the_penalty_answers_for_all_layers_or_for_its_own() -> None:
    moved = {}
    for scope in ("model", "layer"):
        router, _ = build(ReLURouterConfig(mean_k=2.0, mean_over=scope))
        with torch.no_grad():
            router.get_buffer("log_l1_coeff").fill_(-3.0)
        router.update(RouterCounts([1] * 8, [0, 9], 0.0, 0.0, [], None, model_mean_k=2.5))
        moved[scope] = router.get_buffer("log_l1_coeff").item() + 3.0
    assert moved["model"] == pytest.approx(math.log(1.2) * math.log(1.25), abs=1e-6)
    assert moved["layer"] == pytest.approx(math.log(1.2) * math.log(0.5), abs=1e-6)


def skewed_tokens(generator: torch.Generator, count: int, width: int) -> torch.Tensor:
    """Of unit mean square, with a common direction, so that some experts are liked by nearly all."""
    x = torch.randn(count, width, generator=generator)
    x = x + 1.5 * torch.randn(width, generator=torch.Generator().manual_seed(0))
    return x / x.square().mean(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("rule", ["joint", "separate"])
@pytest.mark.parametrize(("num_experts", "mean_k"), [(8, 2.0), (16, 3.5)])
def test_thresholds_hold_the_mean_within_one_percent_and_balance(rule: str, num_experts: int, mean_k: float) -> None:
    settings = BiasThresholdRouterConfig(mean_k=mean_k, rule=rule)
    router, _ = build(settings, hidden_size=64, num_experts=num_experts)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        router.weight.copy_(torch.randn(num_experts, 64, generator=generator) * 0.02)
    means, spread = [], []
    for _ in range(300):
        with torch.no_grad():
            decision = router(skewed_tokens(generator, 2048, 64), RoutingContext(2048, 1, 2048, 0, None))
        counts = counts_of(decision, num_experts)
        means.append(counts.mean_k)
        spread.append(max(counts.tokens_per_expert) * num_experts / sum(counts.tokens_per_expert))
        router.update(counts)
    assert np.mean(means[200:]) == pytest.approx(mean_k, rel=0.01)
    assert np.mean(spread[200:]) < 1.15 < spread[0]


def test_expert_biases_balance_a_skewed_gate() -> None:
    router, _ = build(ExpertBiasRouterConfig(top_k=2), hidden_size=64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        router.weight.copy_(torch.randn(E, 64, generator=generator) * 0.02)
    busiest = []
    for _ in range(300):
        with torch.no_grad():
            decision = router(skewed_tokens(generator, 2048, 64), RoutingContext(2048, 1, 2048, 0, None))
        counts = counts_of(decision, E)
        busiest.append(max(counts.tokens_per_expert) * E / sum(counts.tokens_per_expert))
        router.update(counts)
    assert busiest[0] > 2.0
    assert np.mean(busiest[200:]) < 1.1


def learn(controller: str) -> list[float]:
    """Mean K of 300 steps in which a gate learns to be like one that uses half of the experts, and is held to two.

    Tokens have a common direction, as hidden states have: a linear gate finds half of all scores positive, whatever its
    weights, for tokens that are as often x as -x.
    """
    router, losses = build(ReLURouterConfig(mean_k=2.0, controller=controller), hidden_size=32)
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(32, E, generator=generator) / 6
    with torch.no_grad():
        router.weight.copy_(torch.randn(E, 32, generator=generator) * 0.02)
    optimizer = torch.optim.AdamW(router.parameters(), lr=3e-3, betas=(0.9, 0.95))
    means = []
    for _ in range(300):
        x = skewed_tokens(generator, 512, 32)
        context = RoutingContext(512, 1, 512, 0, None)
        decision = router(x, context)
        slots = torch.where(decision.expert_ids_TK < 0, E, decision.expert_ids_TK)
        gate = torch.zeros(512, E + 1).scatter(1, slots, decision.weights_TK)[:, :E]
        loss = (gate - (x @ teacher).relu()).square().sum(-1).mean() + losses(decision, context).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        counts = counts_of(decision, E)
        means.append(counts.mean_k)
        router.update(counts)
    return means


def test_the_relu_penalty_holds_the_mean_within_one_percent_while_the_gate_learns() -> None:
    means = learn("proportional")
    assert means[0] > 4
    assert np.mean(means[200:]) == pytest.approx(2.0, rel=0.01)
    assert np.std(means[200:]) < 0.15 < 0.5 < np.std(learn("sign")[200:])
