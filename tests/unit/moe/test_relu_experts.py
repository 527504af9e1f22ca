"""Experts with ReLU: NumPy's truth, and rows that do not depend on each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moetrain.moe.diverse_experts import DiverseExperts
from moetrain.moe.experts import GroupedExperts
from moetrain.moe.shared_expert import SharedExpert
from moetrain.ops import plan_permutation

TOKENS, HIDDEN, WIDTHS = 13, 6, [5, 5, 9]


def made(experts: torch.nn.Module) -> list[tuple[np.ndarray, np.ndarray]]:
    """Random weights; fc1 [F, D] and fc2 [D, F] of each expert."""
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    fc1, fc2 = (p.detach().double().numpy() for p in (experts.fc1, experts.fc2))
    if isinstance(experts, DiverseExperts):
        cuts = np.cumsum(WIDTHS)[:-1]
        return [(a, b.T) for a, b in zip(np.split(fc1, cuts), np.split(fc2, cuts), strict=True)]
    return list(zip(fc1, fc2, strict=True))


@pytest.mark.parametrize("diverse", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_experts_are_those_of_the_equation_with_hand_derived_gradients(diverse: bool, weighted: bool) -> None:
    experts = (
        DiverseExperts(WIDTHS, HIDDEN, torch.float32, "relu")
        if diverse
        else GroupedExperts(3, HIDDEN, 5, torch.float32, "relu")
    )
    each = made(experts)
    generator = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(4, generator=generator)[:2] - 1 for _ in range(TOKENS)])  # -1: unused
    x = torch.randn(TOKENS, HIDDEN, generator=generator, requires_grad=True)
    weights = torch.rand(TOKENS, 2, generator=generator, requires_grad=True)
    grad = torch.randn(TOKENS, HIDDEN, generator=generator)
    y = experts(x, weights if weighted else None, plan_permutation(ids, 3))
    y.backward(grad)

    out, dx, dw = np.zeros((TOKENS, HIDDEN)), np.zeros((TOKENS, HIDDEN)), np.zeros((TOKENS, 2))
    dfc1, dfc2 = [np.zeros(a.shape) for a, _ in each], [np.zeros(b.shape) for _, b in each]
    xs, ws, gs = x.detach().double().numpy(), weights.detach().double().numpy(), grad.double().numpy()
    for t in range(TOKENS):
        for slot, e in enumerate(ids[t].tolist()):
            if e < 0:
                continue
            fc1, fc2 = each[e]
            w, h = (ws[t, slot] if weighted else 1.0), np.maximum(fc1 @ xs[t], 0)
            out[t] += w * fc2 @ h
            dw[t, slot] = gs[t] @ fc2 @ h
            dh = w * (fc2.T @ gs[t]) * (h > 0)
            dx[t] += fc1.T @ dh
            dfc1[e] += np.outer(dh, xs[t])
            dfc2[e] += w * np.outer(gs[t], h)
    np.testing.assert_allclose(y.detach().numpy(), out, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(x.grad.numpy(), dx, rtol=1e-4, atol=1e-4)
    if weighted:
        np.testing.assert_allclose(weights.grad.numpy(), dw, rtol=1e-4, atol=1e-4)
    stacked = np.concatenate(dfc1) if diverse else np.stack(dfc1)
    np.testing.assert_allclose(experts.fc1.grad.numpy(), stacked, rtol=1e-4, atol=1e-4)
    stacked = np.concatenate([d.T for d in dfc2]) if diverse else np.stack(dfc2)
    np.testing.assert_allclose(experts.fc2.grad.numpy(), stacked, rtol=1e-4, atol=1e-4)


def test_a_tokens_result_does_not_depend_on_the_others() -> None:
    experts = GroupedExperts(3, HIDDEN, 5, torch.float32, "relu")
    made(experts)
    x, ids = torch.randn(TOKENS, HIDDEN), torch.randint(3, (TOKENS, 1))
    whole = experts(x, None, plan_permutation(ids, 3))
    for t in range(TOKENS):
        assert torch.equal(experts(x[t : t + 1], None, plan_permutation(ids[t : t + 1], 3))[0], whole[t])


def test_a_shared_expert_is_fc2_of_relu_of_fc1() -> None:
    expert = SharedExpert(HIDDEN, 5, torch.float32, "relu")
    assert expert.fc1.shape == (5, HIDDEN)
    for parameter in expert.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(TOKENS, HIDDEN)
    torch.testing.assert_close(expert(x), (x @ expert.fc1.T).clamp(min=0) @ expert.fc2.T)
