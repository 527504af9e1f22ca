"""The fused expert layer on a GPU, held to the composition of the references in double.

Legend: T tokens, K slots a token, R routed rows, E experts, D hidden, F expert width.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moetrain import ops
from moetrain.ops import reference
from moetrain.ops.cases import DTYPES, routings

DEVICE = "cuda"
pytestmark = pytest.mark.usefixtures("poison")

ROUTINGS = {
    **routings(),
    "large": (torch.randint(-1, 7, (3000, 2), generator=torch.Generator().manual_seed(0)), 8),
}
WIDTHS = ((16, 8), (33, 5), (24, 72), (264, 520))  # D, F: aligned or not, several tiles
by_routing = pytest.mark.parametrize("routing", ROUTINGS)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_widths = pytest.mark.parametrize("widths", WIDTHS, ids=str)

_ops = torch.ops.moetrain


class Layer(NamedTuple):
    x: Tensor
    weights: Tensor | None
    fc1: Tensor
    fc2: Tensor
    plan: ops.PermutePlan

    def arguments(self) -> tuple[Tensor | None, ...]:
        return *self[:4], self.plan.row_token_R, self.plan.slot_row_TK, self.plan.tokens_per_expert_E


def make(routing: str, widths: tuple[int, int], dtype: torch.dtype, weighted: bool = True) -> Layer:
    ids, experts = ROUTINGS[routing]
    hidden, width = widths
    torch.manual_seed(hidden)
    layer = (
        torch.randn(ids.size(0), hidden).to(dtype),
        torch.rand(ids.shape),
        (torch.randn(experts, 2 * width, hidden) / hidden**0.5).to(dtype),
        (torch.randn(experts, hidden, width) / width**0.5).to(dtype),
    )
    x, weights, fc1, fc2 = (t.to(DEVICE) for t in layer)
    return Layer(x, weights if weighted else None, fc1, fc2, ops.plan_permutation(ids.to(DEVICE), experts))


def exact(layer: Layer, grad: Tensor) -> list[Tensor]:
    """Output, and gradients of x, weights, fc1 and fc2, in double."""
    plan = layer.plan
    weights = torch.ones(plan.slot_row_TK.shape, device=DEVICE) if layer.weights is None else layer.weights
    leaves = [t.detach().double().requires_grad_() for t in (layer.x, weights, layer.fc1, layer.fc2)]
    x, weights, fc1, fc2 = leaves
    z = reference.grouped_gemm(reference.permute(x, plan.row_token_R), fc1, plan.tokens_per_expert_E)
    gate, up = z.chunk(2, dim=-1)
    rows = reference.grouped_gemm(F.silu(gate) * up, fc2, plan.tokens_per_expert_E)
    y = reference.combine(rows, weights, plan.slot_row_TK)
    # The sum of zeros ties leaves to the output when no slot is used.
    (y + sum(0 * leaf.sum() for leaf in leaves)).backward(grad.double())
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def run(layer: Layer, grad: Tensor, wanted: tuple[bool, ...] = (True,) * 4) -> list[Tensor]:
    y, z = _ops.expert_layer_forward(*layer.arguments(), True)
    return [y, *_ops.expert_layer_backward(grad, *layer.arguments(), z, list(wanted))]


def assert_all_close(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype) -> None:
    tolerance = 2e-5 if dtype == torch.float32 else 2.5e-2  # bfloat16 rounds z, h, rows, dh and dz
    for name, our, their in zip(("y", "dx", "dweights", "dfc1", "dfc2"), ours, theirs, strict=True):
        assert our.shape == their.shape, name
        assert not our.isnan().any(), name
        if our.numel():
            error = (our.double() - their).abs().max().item()
            assert error <= tolerance * max(1.0, their.abs().max().item()), name


@by_routing
@by_widths
@by_dtype
def test_layer_and_gradients_match_the_references_in_double(routing, widths, dtype, library):
    layer = make(routing, widths, dtype)
    grad = torch.randn_like(layer.x)
    results = run(layer, grad)
    assert_all_close(results, exact(layer, grad), dtype)
    assert (results[2][layer.plan.slot_row_TK < 0] == 0).all()


@by_routing
@by_dtype
def test_without_weights_they_are_one(routing, dtype, library):
    layer = make(routing, (24, 72), dtype, weighted=False)
    ones = layer._replace(weights=torch.ones(layer.plan.slot_row_TK.shape, device=DEVICE))
    grad = torch.randn_like(layer.x)
    ours, theirs = run(layer, grad), run(ones, grad)
    assert ours[2].numel() == 0
    for i in (0, 1, 3, 4):
        assert torch.equal(ours[i], theirs[i])


@by_dtype
@pytest.mark.parametrize("wanted", range(1, 16))
def test_only_wanted_gradients_are_computed_and_to_the_same_bits(dtype, wanted, library):
    flags = tuple(bool(wanted >> i & 1) for i in range(4))
    layer = make("many", (24, 72), dtype)
    grad = torch.randn_like(layer.x)
    some, every = run(layer, grad, flags)[1:], run(layer, grad)[1:]
    for our, their, want in zip(some, every, flags, strict=True):
        assert torch.equal(our, their) if want else our.shape == (0,)


@by_dtype
def test_forward_without_backward_keeps_nothing(dtype, library):
    layer = make("many", (24, 72), dtype)
    y, z = _ops.expert_layer_forward(*layer.arguments(), False)
    assert z.shape == (0, 144)
    assert torch.equal(y, _ops.expert_layer_forward(*layer.arguments(), True)[0])


@by_dtype
@by_widths
def test_a_token_does_not_depend_on_the_others(dtype, widths, library):
    layer = make("large", widths, dtype)
    grad = torch.randn_like(layer.x)
    ids, experts = ROUTINGS["large"]
    for kept in (torch.arange(1000, 1100), torch.tensor([1234])):
        there = kept.to(DEVICE)
        assert layer.weights is not None
        alone = layer._replace(
            x=layer.x[there],
            weights=layer.weights[there],
            plan=ops.plan_permutation(ids[kept].to(DEVICE), experts),
        )
        for crowd, one in zip(run(layer, grad)[:3], run(alone, grad[there])[:3], strict=True):
            assert torch.equal(crowd[there], one)


@by_dtype
def test_two_runs_give_the_same_bits(dtype, library):
    layer = make("large", (264, 520), dtype)
    grad = torch.randn_like(layer.x)
    for once, again in zip(run(layer, grad), run(layer, grad), strict=True):
        assert torch.equal(once, again)


@by_dtype
def test_the_public_layer_has_these_values_and_gradients(dtype):
    layer = make("many", (24, 72), dtype)
    assert layer.weights is not None
    x, weights, fc1, fc2 = leaves = [t.requires_grad_() for t in (layer.x, layer.weights, layer.fc1, layer.fc2)]
    grad = torch.randn_like(layer.x)
    y = ops.expert_layer(x, weights, fc1, fc2, layer.plan)
    y.backward(grad)
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert_all_close([y.detach(), *gradients], exact(layer, grad), dtype)


def test_nothing_waits_for_the_device():
    layer = make("large", (264, 520), torch.bfloat16)
    grad = torch.randn_like(layer.x)
    run(layer, grad)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(layer, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_weights_of_another_shape_are_refused():
    layer = make("many", (24, 72), torch.float32)
    with pytest.raises(ValueError, match="fc1 must have shape"):
        run(layer._replace(fc1=layer.fc1[:, 1:]), layer.x)


def test_operators_obey_the_rules_of_the_dispatcher():
    layer = make("empty_expert", (16, 8), torch.float32)
    torch.library.opcheck(_ops.expert_layer_forward.default, (*layer.arguments(), True))
    _, z = _ops.expert_layer_forward(*layer.arguments(), True)
    torch.library.opcheck(
        _ops.expert_layer_backward.default, (layer.x, *layer.arguments(), z, [True, False, True, True])
    )
