"""Plan, gather and combine on a GPU, held to the CPU's bits on the shapes of the CPU tests."""

from __future__ import annotations

import pytest
import torch

from moetrain import ops
from moetrain.ops import reference
from moetrain.ops.cases import DTYPES, WIDTHS, routings

DEVICE = "cuda"
pytestmark = pytest.mark.usefixtures("poison")

ROUTINGS = routings()
by_routing = pytest.mark.parametrize("routing", ROUTINGS)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def grad_of(leaf: torch.Tensor) -> torch.Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _plans(routing: str) -> tuple[ops.PermutePlan, ops.PermutePlan]:
    """The plan made on the GPU, and the CPU's."""
    ids, num_experts = ROUTINGS[routing]
    return ops.plan_permutation(ids.to(DEVICE), num_experts), ops.plan_permutation(ids, num_experts)


@by_routing
def test_plan_is_the_cpu_plan(routing):
    for ours, theirs in zip(*_plans(routing), strict=True):
        assert torch.equal(ours.cpu(), theirs)


def test_plan_of_many_chunks_is_stable():
    ids = torch.randint(-1, 61, (5000, 6))
    for ours, theirs in zip(ops.plan_permutation(ids.to(DEVICE), 61), reference.plan_permutation(ids, 61), strict=True):
        assert torch.equal(ours.cpu(), theirs)


def test_plan_names_the_place_of_an_illegal_expert():
    with pytest.raises(ValueError, match=r"expert_ids\[1, 1\] is illegal"):
        ops.plan_permutation(torch.tensor([[0, 1], [2, 4]]).to(DEVICE), 4)


@by_routing
@pytest.mark.parametrize("width", WIDTHS)
@by_dtype
def test_permute_and_combine_are_the_cpu_bits(routing, width, dtype):
    torch.manual_seed(width)
    on_gpu, on_cpu = _plans(routing)
    x = torch.randn(on_cpu.slot_row_TK.size(0), width).to(dtype)
    weights = torch.rand(on_cpu.slot_row_TK.shape)
    grad = torch.randn(x.shape).to(dtype)
    results = []
    for plan, device in ((on_gpu, DEVICE), (on_cpu, "cpu")):
        leaf_x = x.to(device, copy=True).requires_grad_()
        leaf_weights = weights.to(device, copy=True).requires_grad_()
        y = ops.combine(ops.permute(leaf_x, plan), leaf_weights, plan)
        y.backward(grad.to(device))
        results.append(
            (
                y.detach().cpu(),
                grad_of(leaf_x),
                grad_of(leaf_weights),
                ops.unpermute(ops.permute(x.to(device), plan), plan),
            )
        )
    for ours, theirs in ((results[0][i].cpu(), results[1][i]) for i in (0, 1, 3)):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(results[0][2].cpu(), results[1][2], rtol=1e-5, atol=1e-4)
    assert (results[0][2].cpu()[on_cpu.slot_row_TK < 0] == 0).all()


def test_reorder_by_expert_is_the_cpu_index():
    counts = torch.tensor([[3, 2], [0, 0], [1, 1]])
    for ours, theirs in zip(ops.reorder_by_expert(counts.to(DEVICE)), ops.reorder_by_expert(counts), strict=True):
        assert torch.equal(ours.cpu(), theirs)


def test_operators_obey_the_rules_of_the_dispatcher():
    plan, _ = _plans("tokens_without_experts")
    tokens = torch.randn(4, 6).to(DEVICE).requires_grad_()
    torch.library.opcheck(torch.ops.moetrain.permute_rows.default, (tokens, plan.row_token_R, plan.slot_row_TK))
    rows = torch.randn(plan.row_token_R.numel(), 6).to(DEVICE).requires_grad_()
    weights = torch.rand(plan.slot_row_TK.shape).to(DEVICE).requires_grad_()
    torch.library.opcheck(torch.ops.moetrain.combine_rows.default, (rows, weights, plan.slot_row_TK))
