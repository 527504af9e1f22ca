"""Grouped products on a GPU: own kernels and torch's, held to the same reference, and to the bits of a row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moetrain import ops
from moetrain.ops import reference
from moetrain.ops.cases import DTYPES, GEMMS

DEVICE = "cuda"
pytestmark = pytest.mark.usefixtures("poison")

# Large enough that the kernels choose their large tile, in all three products; experts share row tiles unevenly.
LARGE = ((1500, 0, 2001, 700), 1032, 2048)
ALIGNED = {
    "aligned": ((40, 0, 150, 3), 64, 80),
    "aligned_tails": ((140, 20), 136, 528),
    "many_bands": ((1200, 5), 16, 32),
    "large_tiles": LARGE,
}
CASES = {**GEMMS, **ALIGNED}
by_case = pytest.mark.parametrize("case", CASES)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

_ops = torch.ops.moetrain


def grad_of(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def make(case: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    counts, k, n = CASES[case]
    torch.manual_seed(k * n)
    w = torch.randn(len(counts), n, k) / k**0.5
    return (
        torch.randn(sum(counts), k).to(dtype).to(DEVICE),
        w.to(dtype).to(DEVICE),
        torch.tensor(counts).to(DEVICE),
    )


def relative_tolerance(dtype: torch.dtype) -> float:
    return 2e-5 if dtype == torch.float32 else 8e-3


def assert_close(ours: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Within rounding of ``exact``, which is in double, measured by the largest element."""
    assert not ours.isnan().any()
    if ours.numel():
        error = (ours.double() - exact).abs().max().item()
        assert error <= relative_tolerance(dtype) * max(1.0, exact.abs().max().item())


@by_case
@by_dtype
def test_grouped_gemm_and_gradients_match_the_reference_in_double(case, dtype, library):
    x, w, counts = make(case, dtype)
    wide_x, wide_w = x.double().requires_grad_(), w.double().requires_grad_()
    x.requires_grad_()
    w.requires_grad_()
    y, wide_y = ops.grouped_gemm(x, w, counts), reference.grouped_gemm(wide_x, wide_w, counts)
    grad = torch.randn_like(y)
    y.backward(grad)
    wide_y.backward(grad.double())
    assert_close(y, wide_y, dtype)
    assert_close(grad_of(x), grad_of(wide_x), dtype)
    assert_close(grad_of(w), grad_of(wide_w), dtype)
    assert (grad_of(w)[counts == 0] == 0).all()


@by_case
@by_dtype
def test_gathered_product_is_the_product_of_gathered_rows_to_the_bit(case, dtype, library):
    x, w, counts = make(case, dtype)
    source = torch.randint(0, max(x.size(0), 1), (x.size(0),)).to(DEVICE)
    assert torch.equal(
        _ops.gathered_grouped_gemm(x, w, source, counts), _ops.grouped_gemm(x[source].contiguous(), w, counts)
    )


@by_case
@by_dtype
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_weight_gradient_goes_into_a_kept_buffer(case, dtype, accumulate, wide):
    x, w, counts = make(case, dtype)
    grad = torch.randn(x.size(0), w.size(1)).to(dtype).to(DEVICE)
    out = torch.randn(w.shape).to(torch.float32 if wide else dtype).to(DEVICE)
    groups = zip(grad.double().split(counts.tolist()), x.double().split(counts.tolist()), strict=True)
    exact = torch.stack([g.T @ rows for g, rows in groups])
    if accumulate:
        exact += out.double()
    else:
        out.fill_(float("nan"))
    _ops.grouped_gemm_wgrad_out(grad, x, counts, out, accumulate)
    assert_close(out, exact, torch.float32 if wide else dtype)


@by_dtype
@pytest.mark.parametrize("width", [(100, 33), (64, 128), (1032, 2048)], ids=str)
@pytest.mark.parametrize("share", [0.4, 0.03, 0.0])
def test_a_row_does_not_depend_on_its_neighbors(dtype, width, share, library):
    """Few rows and many take different tiles, in torch's product also different kernels."""
    k, n = width
    torch.manual_seed(0)
    crowd = torch.tensor([900, 2370, 1130])
    rows = int(crowd.sum())
    x, grad = torch.randn(rows, k).to(dtype).to(DEVICE), torch.randn(rows, n).to(dtype).to(DEVICE)
    w = torch.randn(3, n, k).to(dtype).to(DEVICE)
    kept = torch.rand(rows) < share
    kept[1234] = True
    fewer = torch.bincount(torch.arange(3).repeat_interleave(crowd)[kept], minlength=3).to(DEVICE)
    crowd, kept = crowd.to(DEVICE), kept.to(DEVICE)
    assert torch.equal(_ops.grouped_gemm(x, w, crowd)[kept], _ops.grouped_gemm(x[kept], w, fewer))
    assert torch.equal(_ops.grouped_gemm_dgrad(grad, w, crowd)[kept], _ops.grouped_gemm_dgrad(grad[kept], w, fewer))


@by_dtype
def test_two_runs_give_the_same_bits(dtype, library):
    x, w, counts = make("large_tiles", dtype)
    grad = torch.randn(x.size(0), w.size(1)).to(dtype).to(DEVICE)
    products = (
        lambda: _ops.grouped_gemm(x, w, counts),
        lambda: _ops.grouped_gemm_dgrad(grad, w, counts),
        lambda: _ops.grouped_gemm_wgrad(grad, x, counts),
    )
    for product in products:
        assert torch.equal(product(), product())


@by_dtype
def test_rows_that_no_expert_claims_are_zero(dtype, library):
    x, w = torch.randn(300, 64).to(dtype).to(DEVICE), torch.randn(2, 32, 64).to(dtype).to(DEVICE)
    y = ops.grouped_gemm(x, w, torch.tensor([100, 50]).to(DEVICE))
    assert (y[150:] == 0).all()
    assert (y[:150] != 0).any(dim=1).all()


@by_dtype
def test_counts_beyond_the_rows_are_cut(dtype, library):
    x, w = torch.randn(300, 64).to(dtype).to(DEVICE), torch.randn(2, 32, 64).to(dtype).to(DEVICE)
    cut = ops.grouped_gemm(x, w, torch.tensor([250, 100]).to(DEVICE))
    assert torch.equal(cut, ops.grouped_gemm(x, w, torch.tensor([250, 50]).to(DEVICE)))


def test_an_unknown_library_is_refused(monkeypatch):
    monkeypatch.setenv("MOETRAIN_CUDA_GEMM", "fast")
    x, w, counts = make("aligned", torch.bfloat16)
    with pytest.raises(ValueError, match="MOETRAIN_CUDA_GEMM is 'fast'; legal values are own and torch"):
        ops.grouped_gemm(x, w, counts)


def test_a_kept_buffer_of_another_shape_is_refused():
    x, w, counts = make("aligned", torch.bfloat16)
    grad = torch.randn(x.size(0), w.size(1)).bfloat16().to(DEVICE)
    with pytest.raises(ValueError, match="out must be contiguous of shape"):
        _ops.grouped_gemm_wgrad_out(grad, x, counts, w.transpose(1, 2), False)


def test_operators_obey_the_rules_of_the_dispatcher():
    x, w, counts = make("empty_experts", torch.float32)
    source = torch.arange(x.size(0)).to(DEVICE)
    torch.library.opcheck(_ops.gathered_grouped_gemm.default, (x, w, source, counts))
    grad = torch.randn(x.size(0), w.size(1)).to(DEVICE)
    torch.library.opcheck(_ops.grouped_gemm_wgrad_out.default, (grad, x, counts, torch.zeros_like(w), True))
    torch.library.opcheck(_ops.grouped_gemm.default, (x.requires_grad_(), w.requires_grad_(), counts))
