"""Grouped GEMM against the reference, its row invariance, and its speed beside ``F.grouped_mm``."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain import ops
from moetrain.ops import reference
from moetrain.ops.cases import DTYPES, GEMMS

by_case = pytest.mark.parametrize("case", GEMMS)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def grad_of(leaf: torch.Tensor) -> torch.Tensor:
    assert leaf.grad is not None
    return leaf.grad


def make(case: str, dtype: torch.dtype = torch.float32):
    """Rows, weights and counts of a case."""
    counts, k, n = GEMMS[case]
    torch.manual_seed(k * n)
    x = torch.randn(sum(counts), k).to(dtype)
    w = (torch.randn(len(counts), n, k) / k**0.5).to(dtype)
    return x, w, torch.tensor(counts)


def assert_close(actual, expected, dtype):
    tolerance = 2e-5 if dtype == torch.float32 else 8e-3  # one rounding to bf16
    torch.testing.assert_close(actual, expected.to(dtype), rtol=tolerance, atol=tolerance)


@by_case
@by_dtype
def test_forward_and_gradients_match_the_reference_in_double(case, dtype):
    x, w, counts = make(case, dtype)
    x.requires_grad_()
    w.requires_grad_()
    wide_x, wide_w = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    y = ops.grouped_gemm(x, w, counts)
    wide_y = reference.grouped_gemm(wide_x, wide_w, counts)
    grad = torch.randn(y.shape).to(dtype)
    y.backward(grad)
    wide_y.backward(grad.double())
    assert y.dtype == dtype
    assert_close(y, wide_y, dtype)
    assert_close(grad_of(x), grad_of(wide_x), dtype)
    torch.testing.assert_close(grad_of(w).double(), grad_of(wide_w), rtol=8e-3, atol=1e-4)
    assert (grad_of(w)[counts == 0] == 0).all()


def _error(actual, wide):
    return float((actual.double() - wide).abs().max()) if wide.numel() else 0.0


@settings(max_examples=350, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    k=st.integers(1, 160),
    n=st.integers(1, 80),
    seed=st.integers(0, 2**31),
)
def test_three_products_of_random_shapes_err_no_more_than_torch(counts, k, n, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(counts), k, generator=generator)
    grad = torch.randn(sum(counts), n, generator=generator)
    w = torch.randn(len(counts), n, k, generator=generator)
    per_expert = torch.tensor(counts)
    library = torch.ops.moetrain
    products = {
        "fprop": (library.grouped_gemm(x, w, per_expert), lambda x, w, _: x @ w.T),
        "dgrad": (library.grouped_gemm_dgrad(grad, w, per_expert), lambda _, w, grad: grad @ w),
        "wgrad": (library.grouped_gemm_wgrad(grad, x, per_expert), lambda x, _, grad: grad.T @ x),
    }
    groups = list(zip(x.split(counts), w, grad.split(counts), strict=True))
    join = {"fprop": torch.cat, "dgrad": torch.cat, "wgrad": torch.stack}
    for name, (ours, product) in products.items():
        torchs = join[name]([product(*group) for group in groups])
        wide = join[name]([product(*(t.double() for t in group)) for group in groups])
        sizes = join[name]([product(*(t.abs() for t in group)) for group in groups])
        # A single number of torch's may be right by luck; half an ulp of the sum of magnitudes is allowed.
        luck = torch.finfo(torch.float32).eps / 2 * float(sizes.max() if sizes.numel() else 0)
        assert _error(ours, wide) <= 3 * max(_error(torchs, wide), luck), name


def test_a_row_alone_is_the_row_in_a_crowd_in_every_case():
    for case in GEMMS:
        x, w, counts = make(case)
        y = ops.grouped_gemm(x, w, counts)
        for row in {0, x.size(0) // 2, x.size(0) - 1} if x.size(0) else ():
            expert = int(torch.repeat_interleave(torch.arange(len(counts)), counts)[row])
            assert torch.equal(ops.row_invariant_linear(x[row : row + 1], w[expert]), y[row : row + 1]), case


@settings(max_examples=25, deadline=None)
@given(
    keep=st.lists(st.booleans(), min_size=70, max_size=70),
    k=st.sampled_from([1, 7, 33, 100, 300]),
    n=st.sampled_from([1, 15, 32, 70]),
    dtype=st.sampled_from(DTYPES),
    threads=st.sampled_from([1, 2, 3]),
)
def test_grouped_gemm_row_does_not_depend_on_its_neighbors(keep, k, n, dtype, threads):
    torch.manual_seed(k * n)
    x, grad = torch.randn(70, k).to(dtype), torch.randn(70, n).to(dtype)
    w = torch.randn(3, n, k).to(dtype)
    expert_of_row = torch.arange(3).repeat_interleave(torch.tensor([20, 37, 13]))
    kept = torch.tensor(keep)
    fewer = torch.bincount(expert_of_row[kept], minlength=3)
    before = torch.get_num_threads()
    crowd = torch.tensor([20, 37, 13])
    y, dx = ops.grouped_gemm(x, w, crowd), torch.ops.moetrain.grouped_gemm_dgrad(grad, w, crowd)
    try:
        torch.set_num_threads(threads)
        few_y = ops.grouped_gemm(x[kept], w, fewer)
        few_dx = torch.ops.moetrain.grouped_gemm_dgrad(grad[kept], w, fewer)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(y[kept], few_y)
    assert torch.equal(dx[kept], few_dx)


def test_row_does_not_depend_on_its_neighbors_across_blocks_and_threads():
    torch.manual_seed(0)
    x, w = torch.randn(1100, 300), torch.randn(1, 600, 300)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(ops.grouped_gemm(x, w, torch.tensor([1100])))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    pieces = [ops.grouped_gemm(piece, w, torch.tensor([piece.size(0)])) for piece in x.split([1, 479, 17, 603])]
    assert torch.equal(results[0], torch.cat(pieces))


def test_a_row_of_nans_stays_alone():
    x, w, counts = make("tails")
    clean = ops.grouped_gemm(x, w, counts)
    x[5] = float("nan")
    x[40] = float("inf")
    dirty = ops.grouped_gemm(x, w, counts)
    others = torch.ones(x.size(0), dtype=torch.bool)
    others[[5, 40]] = False
    assert torch.equal(dirty[others], clean[others])
    assert dirty[5].isnan().all()


def test_weight_gradient_does_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    x, grad, counts = torch.randn(900, 70), torch.randn(900, 130), torch.tensor([700, 0, 200])
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.ops.moetrain.grouped_gemm_wgrad(grad, x, counts))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@by_case
@by_dtype
def test_gathering_while_multiplying_is_gathering_before(case, dtype):
    x, w, counts = make(case, dtype)
    tokens = torch.randn(max(x.size(0) // 2, 1), x.size(1)).to(dtype)
    source = torch.randint(0, tokens.size(0), (x.size(0),))
    together = ops.gathered_grouped_gemm(tokens, w, source, counts)
    assert torch.equal(together, ops.grouped_gemm(tokens[source], w, counts))


@by_case
@by_dtype
def test_a_kept_buffer_gets_the_weight_gradient_or_its_sum_to_the_bit(case, dtype):
    x, w, counts = make(case, dtype)
    grad = torch.randn(x.size(0), w.size(1)).to(dtype)
    wanted = torch.ops.moetrain.grouped_gemm_wgrad(grad, x, counts)
    kept = torch.full_like(wanted, float("nan"))
    ops.grouped_gemm_wgrad_out(grad, x, counts, kept, accumulate=False)
    assert torch.equal(kept, wanted)
    wide = torch.full(wanted.shape, float("nan"))
    ops.grouped_gemm_wgrad_out(grad, x, counts, wide, accumulate=False)
    assert torch.equal(wide.to(dtype), wanted)
    before = torch.randn(wanted.shape)
    kept = before.clone()
    ops.grouped_gemm_wgrad_out(grad, x, counts, kept, accumulate=True)
    assert torch.equal(kept, before + wide)
    kept = before.to(dtype, copy=True)
    ops.grouped_gemm_wgrad_out(grad, x, counts, kept, accumulate=True)
    assert torch.equal(kept, (before.to(dtype).float() + wide).to(dtype))


def test_inputs_and_gradients_may_be_expanded_or_strided():
    x, w, counts = make("tails")
    strided_x = x.t().contiguous().t().requires_grad_()
    strided_w = w.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    y = ops.grouped_gemm(strided_x, strided_w, counts)
    assert torch.equal(y, ops.grouped_gemm(x, w, counts))
    y.sum().backward()  # an expanded gradient, on which F.grouped_mm fails
    ones = torch.ones_like(y)
    assert torch.equal(grad_of(strided_x), torch.ops.moetrain.grouped_gemm_dgrad(ones, w, counts))
    assert torch.equal(grad_of(strided_w), torch.ops.moetrain.grouped_gemm_wgrad(ones, x, counts))


def test_only_the_wanted_gradient_is_computed():
    x, w, counts = make("tails")
    ops.grouped_gemm(x, w.requires_grad_(), counts).sum().backward()
    assert x.grad is None
    assert w.grad is not None
    ops.grouped_gemm(x.requires_grad_(), w.detach(), counts).sum().backward()
    assert x.grad is not None


def test_row_invariant_linear_is_a_linear_layer():
    torch.manual_seed(0)
    x, w, b = (
        torch.randn(4, 5, 24),
        torch.randn(10, 24, requires_grad=True),
        torch.randn(10, requires_grad=True),
    )
    y = ops.row_invariant_linear(x, w, b)
    torch.testing.assert_close(y, F.linear(x, w, b))
    y.sum().backward()
    torch.testing.assert_close(grad_of(w), x.sum(dim=(0, 1)).expand(10, 24))
    torch.testing.assert_close(grad_of(b), torch.full((10,), 20.0))
    assert ops.row_invariant_linear(x[:0], w).shape == (0, 5, 10)


def test_what_does_not_fit_is_refused_with_the_numbers():
    x, w, counts = make("tails")
    with pytest.raises(ValueError, match="sums to 61, there are 60 rows"):
        ops.grouped_gemm(x[1:], w, counts)
    with pytest.raises(ValueError, match=r"tokens_per_expert\[1\] is -1"):
        ops.grouped_gemm(x, w, torch.tensor([12, -1, 25, 25]))
    with pytest.raises(ValueError, match="4 experts"):
        ops.grouped_gemm(x, w, counts[:3])
    with pytest.raises(ValueError, match="x has 99 columns"):
        ops.grouped_gemm(x[:, 1:], w, counts)
    with pytest.raises(ValueError, match="w must be Float"):
        ops.grouped_gemm(x, w.bfloat16(), counts)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        ops.grouped_gemm(x.double(), w.double(), counts)
    with pytest.raises(ValueError, match=r"row_source\[2\] is 61, x has 61 rows"):
        ops.gathered_grouped_gemm(x, w, torch.tensor([0, 60, 61]), torch.tensor([3, 0, 0, 0]))
    with pytest.raises(ValueError, match=r"row_source\[0\] is -1"):
        ops.gathered_grouped_gemm(x, w, torch.tensor([-1]), torch.tensor([1, 0, 0, 0]))
    with pytest.raises(ValueError, match="sums to 61, there are 1 rows"):
        ops.gathered_grouped_gemm(x, w, torch.tensor([0]), counts)
    grad = torch.randn(61, 33)
    with pytest.raises(ValueError, match=r"out must be contiguous \[4, 33, 100\]"):
        ops.grouped_gemm_wgrad_out(grad, x, counts, torch.empty(4, 100, 33).transpose(1, 2), accumulate=True)
    with pytest.raises(ValueError, match="out must be Float or the dtype of grad, Float; it is BFloat16"):
        ops.grouped_gemm_wgrad_out(grad, x, counts, torch.empty(4, 33, 100).bfloat16(), accumulate=True)


def test_operators_obey_the_rules_of_the_dispatcher():
    x, w, counts = make("empty_experts")
    grad = torch.randn(x.size(0), w.size(1))
    library = torch.ops.moetrain
    torch.library.opcheck(library.grouped_gemm.default, (x.requires_grad_(), w.requires_grad_(), counts))
    torch.library.opcheck(library.grouped_gemm_dgrad.default, (grad, w.detach(), counts))
    torch.library.opcheck(library.grouped_gemm_wgrad.default, (grad, x.detach(), counts))
    source = torch.randint(0, x.size(0), (x.size(0),))
    torch.library.opcheck(library.gathered_grouped_gemm.default, (x.detach(), w.detach(), source, counts))
    for out in (torch.randn(w.shape), torch.randn(w.shape).bfloat16()):
        rows = (grad.to(out.dtype), x.detach().to(out.dtype))
        torch.library.opcheck(library.grouped_gemm_wgrad_out.default, (*rows, counts, out, True))


NARROWER = """
import torch
from moetrain import ops
from moetrain.ops import reference
torch.manual_seed(0)
for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 1e-2)):
    x, w, counts = torch.randn(61, 300), torch.randn(4, 33, 300) / 17, torch.tensor([11, 12, 13, 25])
    x, w = x.to(dtype), w.to(dtype)
    y = ops.grouped_gemm(x, w, counts)
    torch.testing.assert_close(y, reference.grouped_gemm(x, w, counts), rtol=tolerance, atol=tolerance)
    assert torch.equal(y[20:21], ops.row_invariant_linear(x[20:21], w[1]))
    dx = torch.ops.moetrain.grouped_gemm_dgrad(y, w, counts)
    expected = reference.grouped_gemm(y, w.transpose(1, 2), counts)
    torch.testing.assert_close(dx, expected, rtol=tolerance, atol=tolerance)
    dw = torch.ops.moetrain.grouped_gemm_wgrad(y, x, counts)
    groups = zip(y.float().split(counts.tolist()), x.float().split(counts.tolist()))
    expected = torch.stack([grads.T @ rows for grads, rows in groups]).to(dtype)
    torch.testing.assert_close(dw, expected, rtol=tolerance, atol=tolerance)
print(ops.extension_info().cpu_isa)
"""


@pytest.mark.skipif(ops.extension_info().cpu_isa == "base", reason="this CPU has no wider instructions to leave out")
@pytest.mark.parametrize("isa", ["avx2", "base"])
def test_narrower_instruction_sets_agree(isa):
    run = subprocess.run(
        [sys.executable, "-c", NARROWER],
        env={**os.environ, "MOETRAIN_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == isa


def _cpu_seconds(call) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def test_speed_beside_torch_grouped_mm(capsys):
    """Prints ratios of CPU time on one thread, interleaved (above 1: ours is faster), so a busy machine may run it."""
    torch.manual_seed(0)
    d, f, experts, tokens, slots = 512, 1024, 8, 1024, 2
    counts = ops.plan_permutation(torch.randint(0, experts, (tokens, slots)), experts).tokens_per_expert_E
    x, w = torch.randn(tokens * slots, d), torch.randn(experts, f, d)
    grad, ends = torch.randn(tokens * slots, f), counts.cumsum(0).to(torch.int32)
    library = torch.ops.moetrain
    calls = {
        "fprop": lambda: ops.grouped_gemm(x, w, counts),
        "fprop of torch": lambda: F.grouped_mm(x, w.transpose(1, 2), offs=ends),
        "dgrad": lambda: library.grouped_gemm_dgrad(grad, w, counts),
        "dgrad of torch": lambda: F.grouped_mm(grad, w, offs=ends),
        "wgrad": lambda: library.grouped_gemm_wgrad(grad, x, counts),
        "wgrad of torch": lambda: F.grouped_mm(grad.t(), x, offs=ends),
    }
    best = dict.fromkeys(calls, float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(5):
            for name, call in calls.items():
                best[name] = min(best[name], _cpu_seconds(call))
    finally:
        torch.set_num_threads(threads)
    ratios = {name: best[f"{name} of torch"] / best[name] for name in ("fprop", "dgrad", "wgrad")}
    with capsys.disabled():
        shown = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items())
        print(f"\n  fp32 E={experts} R={tokens * slots} d={d} f={f}, against F.grouped_mm: {shown}")
    assert min(ratios.values()) > 0.3
