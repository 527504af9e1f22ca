"""The CPU kernel under the grouped GEMM, in every form of its C door: gathered, scattered, added to, any layout."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain import ops

_gemm = ctypes.CDLL(str(ops.extension_info().path)).moetrain_cpu_gemm
_i64, _ptr, _bool = ctypes.c_int64, ctypes.c_void_p, ctypes.c_bool
_operand = [_ptr, _i64, _bool, _ptr]
_gemm.argtypes = [ctypes.c_int, *_operand, *_operand, _ptr, _i64, _ptr, _bool, _i64, _i64, _i64, ctypes.c_int]
_gemm.restype = None

FORMS = {(torch.float32, torch.float32): 0, (torch.bfloat16, torch.bfloat16): 1, (torch.bfloat16, torch.float32): 2}
EDGES = (1, 2, 7, 13, 14, 15, 16, 31, 32, 33, 50, 65)


def product(a, b, c, *, a_along=True, b_along=True, a_index=None, b_index=None, c_index=None, add=False, threads=1):
    """``c[c_index] (+)= a b^T``; ``x_along``: the reduction axis of x is its rows' (last) axis."""

    def operand(x, along, index):
        rows = x.size(0) if index is None else index.numel()
        shape = (rows, x.size(1)) if along else (x.size(1), rows)
        return shape, (x.data_ptr(), x.stride(0), along, None if index is None else index.data_ptr())

    (m, k), left = operand(a, a_along, a_index)
    (n, same_k), right = operand(b, b_along, b_index)
    assert k == same_k
    target = None if c_index is None else c_index.data_ptr()
    _gemm(FORMS[a.dtype, c.dtype], *left, *right, c.data_ptr(), c.stride(0), target, add, m, n, k, threads)


def fill_scratch_with_nans() -> None:
    nans = torch.full((70, 600), float("nan"))
    for dtype in (torch.float32, torch.bfloat16):
        product(nans.to(dtype), nans.to(dtype), torch.empty(70, 70, dtype=dtype))


@settings(max_examples=250, deadline=None)
@given(
    m=st.sampled_from(EDGES),
    n=st.sampled_from(EDGES),
    k=st.sampled_from((*EDGES, 0, 511, 512, 513, 1040)),
    dtypes=st.sampled_from(sorted(FORMS, key=FORMS.__getitem__)),
    along=st.tuples(st.booleans(), st.booleans()),
    indexed=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    add=st.booleans(),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**31),
)
def test_every_form_gives_the_bits_of_the_plain_product(m, n, k, dtypes, along, indexed, add, threads, seed):
    generator = torch.Generator().manual_seed(seed)
    dtype, out_dtype = dtypes
    a, b = (torch.randn(rows, k, generator=generator).to(dtype) for rows in (m, n))
    plain = torch.full((m, n), float("nan"))
    product(a, b, plain) if dtype == torch.float32 else product(a.float(), b.float(), plain)

    def stored(x, row_wise, by_index):
        x = x if row_wise else x.t()
        if not by_index:
            guarded = torch.full((x.size(0), x.size(1) + 3), float("nan"), dtype=dtype)
            guarded[:, : x.size(1)] = x
            return guarded[:, : x.size(1)], None
        index = torch.randperm(x.size(0) + 2, generator=generator)[: x.size(0)]
        crowd = torch.full((x.size(0) + 2, x.size(1)), float("nan"), dtype=dtype)
        crowd[index] = x
        return crowd, index

    (a, a_index), (b, b_index) = stored(a, along[0], indexed[0]), stored(b, along[1], indexed[1])
    target = torch.randperm(m + 3, generator=generator)[:m] if indexed[2] else None
    rows = torch.arange(m) if target is None else target
    c = torch.full((m + 3, n + 2), float("nan"), dtype=out_dtype)
    before = torch.randn(m, n, generator=generator).to(out_dtype)
    if add:
        c[rows, :n] = before
    fill_scratch_with_nans()
    product(
        a, b, c, a_along=along[0], b_along=along[1], a_index=a_index, b_index=b_index, c_index=target,
        add=add, threads=threads,
    )  # fmt: skip
    expected = torch.full_like(c, float("nan"))
    expected[rows, :n] = (before.float() + plain if add else plain).to(out_dtype)
    torch.testing.assert_close(c, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("m", "n", "k"), [(1000, 70, 40), (460, 33, 600), (40, 2100, 30), (1100, 64, 513)])
@pytest.mark.parametrize("b_along", [True, False])
def test_blocks_of_rows_and_columns_do_not_show_in_the_bits(m, n, k, b_along, threads):
    generator = torch.Generator().manual_seed(m)
    a, b = torch.randn(m, k, generator=generator), torch.randn(n, k, generator=generator)
    b_stored = b if b_along else b.t().contiguous()
    whole = torch.full((m, n), float("nan"))
    fill_scratch_with_nans()
    product(a, b_stored, whole, b_along=b_along, threads=threads)
    for row in (0, m // 3, m - 1):
        alone = torch.full((1, n), float("nan"))
        product(a[row : row + 1], b_stored, alone, b_along=b_along)
        assert torch.equal(whole[row : row + 1], alone)
    for column in (0, n // 2, n - 1):
        alone = torch.full((m, 1), float("nan"))
        product(a, b[column : column + 1], alone)
        assert torch.equal(whole[:, column : column + 1], alone)
    torch.testing.assert_close(whole.double(), a.double() @ b.double().t(), rtol=1e-5, atol=1e-4)
