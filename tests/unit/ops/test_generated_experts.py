"""HyperMoE's generated experts against the reference in double precision, and the bits that they promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain import ops
from moetrain.ops import reference
from moetrain.ops.cases import DTYPES

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(tokens: int, sets: int, hidden: int, bottleneck: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """x, down, down_bias, up, up_bias."""
    torch.manual_seed(tokens + hidden)
    shapes = [
        (tokens, hidden),
        (sets, bottleneck, hidden),
        (sets, bottleneck),
        (sets, hidden, bottleneck),
        (sets, hidden),
    ]
    scales = [1.0, hidden**-0.5, 0.3, bottleneck**-0.5, 0.3]
    x, down, down_bias, up, up_bias = (scale * torch.randn(s) for s, scale in zip(shapes, scales, strict=True))
    # Far from zero, so that rounding puts no hidden unit on the other side of relu.
    down_bias = 6.0 * down_bias.sign() + down_bias
    return [t.to(dtype) for t in (x, down, down_bias, up, up_bias)]


def run(tensors: list[torch.Tensor], set_of_token: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """The output and the five gradients."""
    inputs = [t.clone().requires_grad_() for t in tensors]
    y = ops.generated_experts(*inputs, ops.plan_permutation(set_of_token[:, None], tensors[1].size(0)))
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


def in_double(tensors: list[torch.Tensor], set_of_token: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    inputs = [t.double().requires_grad_() for t in tensors]
    y = reference.generated_experts(*inputs, set_of_token) + sum(t.sum() * 0 for t in inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad.double())]


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.sampled_from([0, 1, 2, 31, 32, 33]), min_size=1, max_size=4),
    hidden=st.sampled_from([1, 31, 64, 300]),
    bottleneck=st.sampled_from([1, 8, 33, 64]),
    dtype=st.sampled_from(DTYPES),
)
def test_random_shapes_give_what_the_reference_gives(counts, hidden, bottleneck, dtype):
    set_of_token = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    set_of_token = set_of_token[torch.randperm(set_of_token.numel(), generator=torch.Generator().manual_seed(0))]
    tensors = make(set_of_token.numel(), len(counts), hidden, bottleneck, dtype)
    grad = torch.randn(tensors[0].shape).to(dtype)
    actual, expected = run(tensors, set_of_token, grad), in_double(tensors, set_of_token, grad)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for mine, exact in zip(actual, expected, strict=True):
        # Terms are of order one, so that is what a sum that nearly cancels is measured by.
        assert (mine.double() - exact).norm() <= bound * max(exact.norm(), exact.numel() ** 0.5)


@by_dtype
def test_a_tokens_output_and_gradient_do_not_depend_on_its_neighbors(dtype):
    set_of_token = torch.randint(0, 3, (90,), generator=torch.Generator().manual_seed(0))
    tensors = make(90, 3, 70, 40, dtype)
    grad = torch.randn(tensors[0].shape).to(dtype)
    kept = torch.arange(90) % 3 != 1
    y, dx, *_ = run(tensors, set_of_token, grad)
    few = run([tensors[0][kept], *tensors[1:]], set_of_token[kept], grad[kept])
    assert torch.equal(y[kept], few[0])
    assert torch.equal(dx[kept], few[1])


@by_dtype
def test_no_bit_depends_on_the_number_of_threads(dtype):
    set_of_token = torch.randint(0, 3, (1500,), generator=torch.Generator().manual_seed(0))
    tensors = make(1500, 3, 300, 64, dtype)
    grad = torch.randn(tensors[0].shape).to(dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(tensors, set_of_token, grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(results[0], other, strict=True))


def test_operators_obey_the_rules_of_the_dispatcher():
    set_of_token = torch.tensor([1, 0, 1, 1])
    plan = ops.plan_permutation(set_of_token[:, None], 3)
    tensors = [t.requires_grad_() for t in make(4, 3, 6, 5, torch.float32)]
    library = torch.ops.moetrain
    rest = (plan.row_token_R, plan.tokens_per_expert_E)
    torch.library.opcheck(library.generated_experts.default, (*tensors, *rest))
    x, down, _, up, _ = (t.detach() for t in tensors)
    arguments = (torch.randn(4, 6), x, down, up, *rest, torch.rand(4, 5))
    torch.library.opcheck(library.generated_experts_backward.default, arguments)


def test_misfits_are_named():
    x, down, down_bias, up, up_bias = make(4, 3, 6, 5, torch.float32)
    plan = ops.plan_permutation(torch.tensor([[1], [0], [1], [1]]), 3)
    with pytest.raises(ValueError, match=r"with x of 6 columns they must be \[G, r, 6\]"):
        ops.generated_experts(x, down[:, :, :5], down_bias, up, up_bias, plan)
    with pytest.raises(ValueError, match=r"up_bias has shape \[3, 5\], it must be \[3, 6\]"):
        ops.generated_experts(x, down, down_bias, up, down_bias, plan)
    with pytest.raises(ValueError, match="must name each of 4 tokens once"):
        ops.generated_experts(
            x, down, down_bias, up, up_bias, plan._replace(row_token_R=torch.zeros(4, dtype=torch.int64))
        )
