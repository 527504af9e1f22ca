"""The compiled operators on a GPU: the shapes of the CPU tests, held to the same references."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain import ops
from moetrain.ops import reference
from moetrain.ops.cases import DTYPES, GEMMS, WIDTHS, routings


def _why_not() -> str | None:
    if not torch.cuda.is_available():
        return "there is no GPU"
    if not ops.extension_info().cuda:
        return f"{ops.extension_info().path} was built without CUDA kernels (MOETRAIN_CUDA)"
    return None


pytestmark = pytest.mark.skipif(_why_not() is not None, reason=f"ops on a GPU: {_why_not()}")

ROUTINGS = routings()
by_routing = pytest.mark.parametrize("routing", ROUTINGS)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_gemm = pytest.mark.parametrize("case", GEMMS)


def grad_of(leaf: torch.Tensor) -> torch.Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _plans(routing: str) -> tuple[ops.PermutePlan, ops.PermutePlan]:
    """The plan made on the GPU, and the CPU's."""
    ids, num_experts = ROUTINGS[routing]
    return ops.plan_permutation(ids.cuda(), num_experts), ops.plan_permutation(ids, num_experts)


@by_routing
def test_plan_is_the_cpu_plan(routing):
    for ours, theirs in zip(*_plans(routing), strict=True):
        assert torch.equal(ours.cpu(), theirs)


def test_plan_of_many_chunks_is_stable():
    ids = torch.randint(-1, 61, (5000, 6))
    for ours, theirs in zip(ops.plan_permutation(ids.cuda(), 61), reference.plan_permutation(ids, 61), strict=True):
        assert torch.equal(ours.cpu(), theirs)


def test_plan_names_the_place_of_an_illegal_expert():
    with pytest.raises(ValueError, match=r"expert_ids\[1, 1\] is illegal"):
        ops.plan_permutation(torch.tensor([[0, 1], [2, 4]]).cuda(), 4)


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
    for plan, device in ((on_gpu, "cuda"), (on_cpu, "cpu")):
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


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.uint8], ids=str)
def test_gather_rows_is_undone_by_its_inverse(dtype):
    x = torch.randn(50, 7).mul(10).to(dtype).cuda()
    index = torch.randperm(50).cuda()
    gathered = ops.gather_rows(x, index)
    assert torch.equal(gathered, x[index])
    assert torch.equal(ops.gather_rows(gathered, torch.argsort(index), index), x)


def test_reorder_by_expert_is_the_cpu_index():
    counts = torch.tensor([[3, 2], [0, 0], [1, 1]])
    for ours, theirs in zip(ops.reorder_by_expert(counts.cuda()), ops.reorder_by_expert(counts), strict=True):
        assert torch.equal(ours.cpu(), theirs)


def _gemm(case: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    counts, k, n = GEMMS[case]
    torch.manual_seed(k * n)
    w = torch.randn(len(counts), n, k) / k**0.5
    return torch.randn(sum(counts), k).to(dtype).cuda(), w.to(dtype).cuda(), torch.tensor(counts).cuda()


@by_gemm
@by_dtype
def test_grouped_gemm_and_gradients_match_the_reference_in_double(case, dtype):
    x, w, counts = _gemm(case, dtype)
    wide_x, wide_w = x.cpu().double().requires_grad_(), w.cpu().double().requires_grad_()
    x.requires_grad_()
    w.requires_grad_()
    y, wide_y = ops.grouped_gemm(x, w, counts), reference.grouped_gemm(wide_x, wide_w, counts.cpu())
    grad = torch.randn(wide_y.shape).to(dtype)
    y.backward(grad.cuda())
    wide_y.backward(grad.double())
    tolerance = 2e-5 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(y.cpu(), wide_y.to(dtype), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad_of(x).cpu(), grad_of(wide_x).to(dtype), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad_of(w).cpu().double(), grad_of(wide_w), rtol=8e-3, atol=1e-4)
    assert (grad_of(w).cpu()[counts.cpu() == 0] == 0).all()


@by_dtype
@pytest.mark.parametrize("width", [(100, 33), (64, 128)], ids=str)
def test_grouped_gemm_row_does_not_depend_on_its_neighbours(dtype, width):
    k, n = width
    torch.manual_seed(0)
    x, grad = torch.randn(700, k).to(dtype).cuda(), torch.randn(700, n).to(dtype).cuda()
    w, crowd = torch.randn(3, n, k).to(dtype).cuda(), torch.tensor([200, 370, 130])
    expert_of_row = torch.arange(3).repeat_interleave(crowd)
    kept = torch.rand(700) < 0.4
    fewer = torch.bincount(expert_of_row[kept], minlength=3).cuda()
    crowd, kept = crowd.cuda(), kept.cuda()
    dgrad = torch.ops.moetrain.grouped_gemm_dgrad
    assert torch.equal(ops.grouped_gemm(x, w, crowd)[kept], ops.grouped_gemm(x[kept], w, fewer))
    assert torch.equal(dgrad(grad, w, crowd)[kept], dgrad(grad[kept], w, fewer))


def test_rows_that_no_expert_claims_are_zero():
    x, w = torch.randn(300, 64).cuda(), torch.randn(2, 32, 64).cuda()
    for dtype in DTYPES:
        y = ops.grouped_gemm(x.to(dtype), w.to(dtype), torch.tensor([100, 50]).cuda())
        assert (y[150:] == 0).all()
        assert (y[:150] != 0).any(dim=1).all()


@pytest.mark.parametrize("measure", sorted(ops.CAUSAL_MEASURES | ops.NONCAUSAL_MEASURES))
def test_importance_matches_the_reference(measure):
    torch.manual_seed(0)
    q, k = torch.randn(130, 2, 4, 16).cuda(), torch.randn(130, 2, 2, 16).cuda()
    expected = reference.attention_importance(q.cpu(), k.cpu(), measure, True, 0.25)
    torch.testing.assert_close(
        ops.attention_with_importance(q, k, k, measure, True, 0.25)[1].cpu(), expected, rtol=1e-3, atol=1e-3
    )


def test_operators_obey_the_rules_of_the_dispatcher():
    x, w, counts = _gemm("empty_experts", torch.float32)
    torch.library.opcheck(torch.ops.moetrain.grouped_gemm.default, (x.requires_grad_(), w.requires_grad_(), counts))
    plan, _ = _plans("tokens_without_experts")
    tokens = torch.randn(4, 6).cuda().requires_grad_()
    torch.library.opcheck(torch.ops.moetrain.permute_rows.default, (tokens, plan.row_token_R, plan.slot_row_TK))


def _milliseconds(call: Callable[[], object], repeats: int = 20) -> float:
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats * 1e3


def test_speed_beside_torch_grouped_mm(capsys):
    """Prints; asserts nothing, for the GPU may be shared."""
    d, f, experts, rows = 2048, 4096, 16, 32768
    counts = torch.full((experts,), rows // experts).cuda()
    ends = counts.cumsum(0).to(torch.int32)
    x, w = torch.randn(rows, d).bfloat16().cuda(), torch.randn(experts, f, d).bfloat16().cuda()
    ours = _milliseconds(lambda: ops.grouped_gemm(x, w, counts))
    theirs = _milliseconds(lambda: F.grouped_mm(x, w.transpose(1, 2), offs=ends))
    with capsys.disabled():
        print(f"\n  bf16 fprop E={experts} R={rows} d={d} f={f}: {ours:.2f} ms, F.grouped_mm {theirs:.2f} ms")
