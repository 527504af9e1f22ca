"""Auxiliary losses and their gradients against NumPy in float64; they do not care how sequences are batched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from moetrain.config.moe import MoEConfig
from moetrain.config.relatives import ComputationFreeConfig
from moetrain.config.routers import TopKRouterConfig
from moetrain.moe.losses import RouterLosses
from moetrain.moe.routing import LoadPenalty, RoutingContext, RoutingDecision
from moetrain.moe.telemetry import RouterCounts

S, E = 10, 4
SCOPES = ("per_sequence", "per_micro_batch", "global_batch")
# What the step before counted: 30 tokens with 60 assignments.
COUNTS = RouterCounts([30, 15, 10, 5], [0, 10, 10, 10, 0], 0.0, 0.0, [], None)


class _Alone:
    """A group of one rank."""

    def size(self) -> int:
        return 1


def losses_of(scope: str, **settings: float) -> RouterLosses:
    moe = MoEConfig(num_experts=E, ffn_hidden_size=4, aux_loss=scope, **settings)
    losses = RouterLosses(moe, _Alone())  # pyright: ignore[reportArgumentType]
    losses.update(COUNTS)
    return losses


def decision_of(logits_SBE: Tensor, **extra: object) -> RoutingDecision:
    """Every expert above a probability of a quarter: a variable number of experts per token."""
    logits = logits_SBE.flatten(0, 1)
    probs = logits.softmax(-1)
    order, keep = probs.sort(descending=True, stable=True)
    ids = torch.where(order > 0.25, keep, -1)
    weights = torch.where(order > 0.25, order, 0.0)
    return RoutingDecision(ids, weights, probs, logits, (ids >= 0).sum(-1), **extra)  # pyright: ignore


def context_of(sequences: int) -> RoutingContext:
    return RoutingContext(local_length=S, sequences=sequences, length=S, start=0, importance_T=None)


def some_logits(sequences: int) -> Tensor:
    return torch.randn(S, sequences, E, generator=torch.Generator().manual_seed(sequences))


def loads_by_hand(probs_SBE: np.ndarray, scope: str) -> np.ndarray:
    """[B, E]: part of the tokens that went to each expert, in the sequence or wherever the scope says."""
    per_sequence = (probs_SBE > 0.25).mean(axis=0)
    if scope == "per_sequence":
        return per_sequence
    one = per_sequence.mean(axis=0) if scope == "per_micro_batch" else np.array(COUNTS.tokens_per_expert) / 30
    return np.broadcast_to(one, per_sequence.shape)


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


@pytest.mark.parametrize("scope", SCOPES)
def test_losses_and_their_gradients_are_those_of_the_equations(scope: str) -> None:
    logits = some_logits(3).requires_grad_()
    values = torch.rand(S * 3, E, generator=torch.Generator().manual_seed(9)).requires_grad_()
    penalty = LoadPenalty(torch.tensor(0.7), values)
    found = losses_of(scope, aux_loss_coeff=0.3, z_loss_coeff=0.2)(
        decision_of(logits, load_penalty=penalty), context_of(3)
    )
    found.total.backward()

    x = logits.detach().numpy().astype(np.float64)
    p, v = softmax(x), values.detach().numpy().astype(np.float64).reshape(S, 3, E)
    loads = loads_by_hand(p, scope)
    share = loads / loads.sum(-1, keepdims=True)
    lse = np.log(np.exp(x).sum(-1))
    balance, z_loss = E * (share * p.mean(0)).sum(-1).mean(), (lse**2).mean()
    total = 0.3 * balance + 0.2 * z_loss + 0.7 * E * (loads * v.mean(0)).sum(-1).mean()
    # d balance / d p is constant, and softmax' vector product is p (g - <g, p>); d lse^2 / d x = 2 lse p.
    g = 0.3 * E * share[None] / (3 * S)
    of_logits = p * (g - (g * p).sum(-1, keepdims=True)) + 0.2 * 2 * lse[..., None] * p / (3 * S)
    of_values = np.broadcast_to(0.7 * E * loads[None] / (3 * S), v.shape)

    assert found.load_balance.item() == pytest.approx(balance, rel=1e-6)
    assert found.z_loss.item() == pytest.approx(z_loss, rel=1e-6)
    assert found.total.item() == pytest.approx(total, rel=1e-6)
    assert logits.grad is not None and values.grad is not None
    np.testing.assert_allclose(logits.grad.numpy(), of_logits, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(values.grad.numpy().reshape(v.shape), of_values, rtol=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
def test_balanced_routing_with_uniform_probabilities_costs_exactly_one(scope: str) -> None:
    ids = (torch.arange(8) % E)[:, None]
    uniform = torch.full((8, E), 0.25)
    decision = RoutingDecision(ids, torch.ones(8, 1), uniform, uniform, torch.ones(8, dtype=torch.int64))
    moe = MoEConfig(num_experts=E, ffn_hidden_size=4, aux_loss=scope)  # global batch: uniform before the first step
    losses = RouterLosses(moe, _Alone())  # pyright: ignore[reportArgumentType]
    assert losses(decision, RoutingContext(4, 2, 4, 0, None)).load_balance.item() == 1.0


def test_a_global_batch_s_first_loads_push_no_choice_though_some_weigh_less_in_the_loss() -> None:
    free = ComputationFreeConfig(zero_experts=1, constant_experts=2, balance_weight=0.25)
    router = TopKRouterConfig(top_k=3)
    moe = MoEConfig(num_experts=E, ffn_hidden_size=4, aux_loss="global_batch", router=router, computation_free=free)
    load = RouterLosses(moe, _Alone()).load  # pyright: ignore[reportArgumentType]
    assert load.shape == (E + 3,)
    assert load.sum().item() == pytest.approx(3.0)
    torch.testing.assert_close(load * torch.tensor([1.0] * E + [0.25] * 3), load[0].expand(E + 3))


@pytest.mark.parametrize("scope", ["per_sequence", "global_batch"])
def test_losses_of_a_micro_batch_are_the_mean_over_its_sequences(scope: str) -> None:
    losses, logits = losses_of(scope), some_logits(6)
    whole = losses(decision_of(logits), context_of(6))
    parts = [losses(decision_of(logits[:, i : i + 1]), context_of(1)) for i in range(6)]
    for name in ("load_balance", "z_loss"):
        mean = torch.stack([getattr(part, name) for part in parts]).mean()
        torch.testing.assert_close(getattr(whole, name), mean)


def test_a_sequence_that_favors_one_expert_costs_less_in_a_wider_scope() -> None:
    """Two sequences, each with an expert of its own: specialised within the sequence, balanced over the batch."""
    logits = torch.full((S, 2, E), -5.0)
    logits[:, 0, :2], logits[:, 1, 2:] = 5.0, 5.0
    narrow, wide = (losses_of(scope)(decision_of(logits), context_of(2)).load_balance for scope in SCOPES[:2])
    assert narrow.item() == pytest.approx(2.0, abs=0.01)
    assert wide.item() == pytest.approx(1.0, abs=0.01)


def test_only_the_global_scope_has_state_and_evaluation_leaves_it_alone() -> None:
    assert [dict(losses_of(scope).controllers()).keys() for scope in SCOPES] == [set(), set(), {"load"}]
    losses = losses_of("global_batch")
    assert losses.load.tolist() == pytest.approx([1.0, 0.5, 1 / 3, 1 / 6])
    before = losses.load.clone()
    losses(decision_of(some_logits(2)), context_of(2))
    assert torch.equal(losses.load, before)


@pytest.mark.parametrize("scope", ["per_sequence", "global_batch"])
def test_padding_counts_in_no_auxiliary_loss(scope: str) -> None:
    losses, logits, lengths = losses_of(scope), some_logits(2), (4, S)
    valid = torch.arange(S)[:, None] < torch.tensor(lengths)
    context = RoutingContext(S, 2, S, 0, None, valid.flatten(), valid.sum(dim=0))
    padded = losses(decision_of(logits).without_padding(valid.flatten()), context)
    parts = [
        losses(decision_of(logits[:n, i : i + 1]), RoutingContext(n, 1, n, 0, None)) for i, n in enumerate(lengths)
    ]
    for name in ("load_balance", "z_loss"):
        torch.testing.assert_close(getattr(padded, name), torch.stack([getattr(p, name) for p in parts]).mean())


def test_a_sequence_of_padding_alone_costs_nothing() -> None:
    nothing = torch.zeros(S, dtype=torch.bool)
    context = RoutingContext(S, 1, S, 0, None, nothing, torch.zeros(1, dtype=torch.int64))
    found = losses_of("per_sequence")(decision_of(some_logits(1)).without_padding(nothing), context)
    assert found.load_balance.item() == 0.0
    assert found.z_loss.item() == 0.0
