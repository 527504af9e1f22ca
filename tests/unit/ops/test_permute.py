"""Permutation, combination and reordering against the reference: bit for bit where sums have an order."""

from __future__ import annotations

import pytest
import torch

from moetrain import ops
from moetrain.ops import reference
from moetrain.ops.cases import DTYPES, WIDTHS, routings

ROUTINGS = routings()
by_routing = pytest.mark.parametrize("routing", ROUTINGS)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def grad_of(leaf: torch.Tensor) -> torch.Tensor:
    assert leaf.grad is not None
    return leaf.grad


def make(routing: str, width: int, dtype: torch.dtype = torch.float32):
    """Inputs of a routing: plan, tokens, slot weights."""
    ids, num_experts = ROUTINGS[routing]
    torch.manual_seed(width)
    plan = ops.plan_permutation(ids, num_experts)
    return plan, torch.randn(ids.size(0), width).to(dtype), torch.rand(ids.shape)


@by_routing
def test_plan_is_the_stable_sort_of_the_used_slots(routing):
    ids, num_experts = ROUTINGS[routing]
    for ours, theirs in zip(
        ops.plan_permutation(ids, num_experts), reference.plan_permutation(ids, num_experts), strict=True
    ):
        assert torch.equal(ours, theirs)


@by_routing
def test_plan_tensors_agree_with_each_other(routing):
    ids, num_experts = ROUTINGS[routing]
    plan = ops.plan_permutation(ids, num_experts)
    rows = torch.arange(plan.row_slot_R.numel())
    assert torch.equal(plan.slot_row_TK.reshape(-1)[plan.row_slot_R], rows)
    assert torch.equal(plan.row_slot_R // max(ids.size(1), 1), plan.row_token_R)
    expert_of_row = torch.repeat_interleave(torch.arange(num_experts), plan.tokens_per_expert_E)
    assert torch.equal(ids.reshape(-1)[plan.row_slot_R], expert_of_row)


def test_plan_accepts_non_contiguous_ids():
    ids = ROUTINGS["many"][0].t().contiguous().t()
    assert not ids.is_contiguous()
    assert torch.equal(ops.plan_permutation(ids, 16)[0], ops.plan_permutation(ids.contiguous(), 16)[0])


@pytest.mark.parametrize("bad", [4, -2, 2**40])
def test_plan_names_the_illegal_expert_and_its_place(bad):
    ids = torch.tensor([[0, 1], [2, bad]])
    with pytest.raises(ValueError, match=rf"expert_ids\[1, 1\] is {bad}; legal values are -1 .* to 3"):
        ops.plan_permutation(ids, 4)


def test_plan_refuses_other_dtypes_and_shapes():
    with pytest.raises(ValueError, match="expert_ids must be Long"):
        ops.plan_permutation(torch.zeros(2, 2, dtype=torch.int32), 4)
    with pytest.raises(ValueError, match="2 dimensions"):
        ops.plan_permutation(torch.zeros(2, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="num_experts"):
        ops.plan_permutation(torch.zeros(2, 2, dtype=torch.int64), 0)


@by_routing
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64], ids=str)
def test_permute_copies_rows_exactly(routing, width, dtype):
    plan, x, _ = make(routing, width, dtype)
    assert torch.equal(ops.permute(x, plan), x[plan.row_token_R])


@by_routing
@pytest.mark.parametrize("width", WIDTHS)
@by_dtype
def test_permute_backward_sums_rows_in_slot_order(routing, width, dtype):
    plan, x, _ = make(routing, width, dtype)
    x.requires_grad_()
    grad = torch.randn(plan.row_token_R.numel(), width).to(dtype)
    ops.permute(x, plan).backward(grad)
    assert torch.equal(grad_of(x), reference.unpermute(grad, plan.slot_row_TK))


@by_routing
@pytest.mark.parametrize("width", WIDTHS)
@by_dtype
def test_combine_is_the_weighted_sum_in_slot_order(routing, width, dtype):
    plan, _, weights = make(routing, width, dtype)
    rows = torch.randn(plan.row_token_R.numel(), width).to(dtype)
    assert torch.equal(ops.combine(rows, weights, plan), reference.combine(rows, weights, plan.slot_row_TK))
    assert torch.equal(ops.unpermute(rows, plan), reference.unpermute(rows, plan.slot_row_TK))


@pytest.mark.parametrize("routing", [name for name in ROUTINGS if name != "no_slots"])
@pytest.mark.parametrize("width", WIDTHS)
@by_dtype
def test_combine_backward_matches_the_reference(routing, width, dtype):
    plan, _, weights = make(routing, width, dtype)
    rows = torch.randn(plan.row_token_R.numel(), width).to(dtype).requires_grad_()
    weights.requires_grad_()
    # Without slots there is nothing to differentiate.
    wide_rows = rows.detach().double().requires_grad_()
    wide_weights = weights.detach().double().requires_grad_()
    grad = torch.randn(plan.slot_row_TK.size(0), width).to(dtype)
    ops.combine(rows, weights, plan).backward(grad)
    reference.combine(wide_rows, wide_weights, plan.slot_row_TK).backward(grad.double())
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(grad_of(rows), grad_of(wide_rows).to(dtype), rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(grad_of(weights), grad_of(wide_weights).float(), rtol=1e-5, atol=1e-4)
    assert (grad_of(weights)[plan.slot_row_TK < 0] == 0).all()


def test_gradients_may_be_expanded_or_strided():
    plan, x, weights = make("many", 33)
    rows = ops.permute(x, plan).requires_grad_()
    weights.requires_grad_()
    ops.combine(rows, weights, plan).sum().backward()  # sum's gradient is an expanded scalar
    assert torch.equal(grad_of(rows), weights.detach().reshape(-1)[plan.row_slot_R, None].expand_as(rows))
    strided = torch.randn(66, 200).t()[:, ::2]
    assert torch.equal(ops.permute(strided, plan), strided[plan.row_token_R])


def test_result_does_not_depend_on_the_number_of_threads():
    plan, x, weights = make("many", 520)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.combine(ops.permute(x, plan), weights, plan))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_combine_after_permute_with_weights_that_sum_to_one_restores_tokens():
    plan, x, _ = make("one_expert_takes_all", 16)
    assert torch.equal(ops.combine(ops.permute(x, plan), torch.full((9, 2), 0.5), plan), x)


def test_a_plan_for_another_tensor_is_refused():
    plan, x, weights = make("many", 8)
    rows = ops.permute(x, plan)
    with pytest.raises(ValueError, match="the plan is for 200 tokens, x has 199"):
        ops.permute(x[1:], plan)
    with pytest.raises(ValueError, match="rows"):
        ops.combine(rows[1:], weights, plan)
    with pytest.raises(ValueError, match="another tensor"):
        ops.combine(torch.cat([rows, rows]), weights, plan)
    with pytest.raises(ValueError, match="weights must be Float"):
        ops.combine(rows, weights.double(), plan)
    with pytest.raises(ValueError, match="weights have shape"):
        ops.combine(rows, weights[:, :2], plan)


@pytest.mark.parametrize(
    "counts", [[[2, 0, 1], [1, 3, 0]], [[0, 0]], [[0], [4], [1]], [[3, 2], [0, 0], [1, 1]]], ids=str
)
def test_reorder_by_expert_groups_the_ranks_of_each_expert(counts):
    counts_WE = torch.tensor(counts)
    for ours, theirs in zip(ops.reorder_by_expert(counts_WE), reference.reorder_by_expert(counts_WE), strict=True):
        assert torch.equal(ours, theirs)


def test_operators_obey_the_rules_of_the_dispatcher():
    plan, x, weights = make("tokens_without_experts", 6)
    library = torch.ops.moetrain
    rows = ops.permute(x, plan)
    calls = [
        (library.plan_permutation, (ROUTINGS["tokens_without_experts"][0], 3)),
        (library.permute_rows, (x.requires_grad_(), plan.row_token_R, plan.slot_row_TK)),
        (library.unpermute_rows, (rows.detach().requires_grad_(), plan.row_token_R, plan.slot_row_TK)),
        (library.combine_rows, (rows.detach().requires_grad_(), weights.requires_grad_(), plan.slot_row_TK)),
        (library.combine_rows_backward, (x.detach(), rows.detach(), weights.detach(), plan.slot_row_TK)),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op.default, arguments)
