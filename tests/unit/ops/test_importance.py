"""Attention with importance against the whole matrix in double, and the proof that nothing causal sees the future."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from moetrain import ops
from moetrain.ops import reference
from moetrain.ops.cases import DTYPES

LIBRARY = torch.ops.moetrain
MEASURES = sorted(ops.CAUSAL_MEASURES | ops.NONCAUSAL_MEASURES)
by_measure = pytest.mark.parametrize("measure", MEASURES)
by_causal_measure = pytest.mark.parametrize("measure", sorted(ops.CAUSAL_MEASURES))
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(
    seq: int = 37, groups: int = 2, width: int = 16, batch: int = 2, heads: int = 4, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seq)
    q, k, v = (torch.randn(seq, batch, n, width).to(dtype) for n in (heads, groups, groups))
    return q, k, v


def padding(batch: int, seq: int) -> Tensor:
    """Real tokens of each sequence; the last sequence has none at all."""
    torch.manual_seed(batch * seq)
    valid_BS = torch.rand(batch, seq) < 0.6
    valid_BS[-1] = False
    return valid_BS


def with_threads(threads: int, call):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


def check(q, k, v, measure, causal, scale, valid=None):
    """Output, log-sum-exp and importance against double; importance from the log-sum-exp as well."""
    out, lse, importance = LIBRARY.attention_forward(q, k, v, measure, causal, scale, valid)
    expected, expected_lse = reference.attention(q.double(), k.double(), v.double(), causal, scale, valid)
    expected_importance = reference.attention_importance(q.double(), k.double(), measure, causal, scale, valid)
    tolerance = 1e-5 if q.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(importance.double(), expected_importance, rtol=2e-5, atol=2e-5)
    later = LIBRARY.importance_from_lse(q, k, lse, measure, causal, scale, valid)
    torch.testing.assert_close(later.double(), expected_importance, rtol=2e-5, atol=2e-5)


@settings(max_examples=40, deadline=None)
@given(
    seq=st.one_of(st.sampled_from([1, 2, 11, 12, 13, 31, 32, 33]), st.integers(1, 120)),
    width=st.sampled_from([1, 3, 16, 31, 32, 33, 40, 64, 80]),
    groups=st.sampled_from([1, 2, 4]),
    measure=st.sampled_from(MEASURES),
    causal=st.booleans(),
    padded=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    threads=st.sampled_from([1, 2]),
)
def test_blocks_give_what_the_whole_matrix_gives(seq, width, groups, measure, causal, padded, dtype, threads):
    q, k, v = make(seq, groups, width, dtype=dtype)
    valid = padding(2, seq) if padded else None
    with_threads(threads, lambda: check(q, k, v, measure, causal, width**-0.5, valid))


@by_measure
@by_dtype
@pytest.mark.parametrize("causal", [True, False])
def test_several_blocks_of_keys_give_what_the_whole_matrix_gives(measure, dtype, causal):
    q, k, v = make(500, 1, 24, batch=1, heads=2, dtype=dtype)
    check(3 * q, k, v, measure, causal, 0.2)
    valid = padding(2, 500)[:1]
    valid[0, 300:] = False  # whole blocks of padding
    check(q, k, v, measure, causal, 0.2, valid)


@by_dtype
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("groups", [1, 4])
def test_gradients_are_those_of_the_reference_in_double(dtype, causal, padded, groups):
    q, k, v = (t.requires_grad_() for t in make(50, groups, 33, dtype=dtype))
    wide_q, wide_k, wide_v = wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    valid = padding(2, 50) if padded else None
    out, _ = ops.attention_with_importance(q, k, v, "row_max", causal, 0.2, valid)
    expected, _ = reference.attention(wide_q, wide_k, wide_v, causal, 0.2, valid)
    grad = torch.randn_like(out)
    mine = torch.autograd.grad(out, (q, k, v), grad)
    theirs = torch.autograd.grad(expected, wide, grad.double())
    # bf16: torch's backward rounds weights and products, and sums of up to 50 x 4 of them.
    tolerance = 2e-5 if dtype == torch.float32 else 1e-1
    for ours, reference_grad in zip(mine, theirs, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), reference_grad, rtol=tolerance, atol=tolerance)


@by_dtype
def test_error_is_no_larger_than_that_of_torch(dtype):
    q, k, v = make(700, 4, 64, batch=1, dtype=dtype)
    expected, _ = reference.attention(q.double(), k.double(), v.double(), True, 0.125)
    ours, _ = ops.attention_with_importance(q, k, v, "row_entropy", True, 0.125)
    heads_first = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    torchs = F.scaled_dot_product_attention(*heads_first, dropout_p=0.0, is_causal=True, scale=0.125)
    error = (ours.double() - expected).square().mean().sqrt()
    error_of_torch = (torchs.permute(2, 0, 1, 3).double() - expected).square().mean().sqrt()
    assert error <= 1.05 * error_of_torch


@by_causal_measure
@by_dtype
@pytest.mark.parametrize("first_changed", [1, 7, 12, 31, 32, 33, 383, 384, 400])
def test_later_tokens_change_no_bit_of_output_or_causal_measures(measure, dtype, first_changed):
    q, k, v = make(410, 2, 16, batch=1, dtype=dtype)
    before = LIBRARY.attention_forward(q, k, v, measure, True, 0.25, None)
    for t in (q, k, v):
        t[first_changed:] = 5 * torch.randn_like(t[first_changed:])
    after = LIBRARY.attention_forward(q, k, v, measure, True, 0.25, None)
    fewer = LIBRARY.attention_forward(*(t[:first_changed] for t in (q, k, v)), measure, True, 0.25, None)
    for old, new, short, sequence_axis in zip(before, after, fewer, (0, 2, 0), strict=True):
        past, future = slice(0, first_changed), slice(first_changed, None)
        old, new, short = (t.movedim(sequence_axis, 0) for t in (old, new, short))
        assert torch.equal(old[past], new[past])
        assert torch.equal(old[past], short)
        assert not torch.equal(old[future], new[future])


@pytest.mark.parametrize("measure", sorted(ops.NONCAUSAL_MEASURES))
def test_received_attention_sees_the_future(measure):
    q, k, v = make()
    _, before = ops.attention_with_importance(q, k, v, measure, True, 0.25)
    q[20:] = 5 * torch.randn_like(q[20:])
    assert not torch.equal(before[:20], ops.attention_with_importance(q, k, v, measure, True, 0.25)[1][:20])


@by_measure
@by_dtype
def test_bits_do_not_depend_on_the_number_of_threads(measure, dtype):
    q, k, v = make(450, 2, 40, dtype=dtype)
    valid = padding(2, 450)
    results = [
        with_threads(threads, lambda: LIBRARY.attention_forward(q, k, v, measure, True, 0.2, valid))
        for threads in (1, 2, 3)
    ]
    for result in results[1:]:
        for ours, theirs in zip(results[0], result, strict=True):
            assert torch.equal(ours, theirs)


@by_measure
def test_what_stands_in_padding_does_not_matter_even_if_it_is_not_finite(measure):
    q, k, v = make(70)
    valid = padding(2, 70)
    clean = LIBRARY.attention_forward(q, k, v, measure, False, 0.25, valid)
    for t in (q, k, v):
        t[~valid.T] = float("nan")
    dirty = LIBRARY.attention_forward(q, k, v, measure, False, 0.25, valid)
    for ours, theirs in zip(clean, dirty, strict=True):
        assert torch.equal(ours, theirs)
    out, lse, importance = clean
    assert (out[~valid.T] == 0).all()
    assert (importance[~valid.T] == 0).all()
    assert torch.isposinf(lse.permute(0, 2, 1)[~valid]).all()


def test_a_nan_spoils_the_queries_that_see_it_and_no_other():
    q, k, v = make(50, batch=1)
    clean, _ = ops.attention_with_importance(q, k, v, "row_max", True, 0.25)
    k[30] = float("nan")
    out, _ = ops.attention_with_importance(q, k, v, "row_max", True, 0.25)
    assert torch.equal(out[:30], clean[:30])
    assert out[30:].isnan().all()


@by_measure
def test_strided_and_expanded_inputs_give_the_same_bits(measure):
    q, k, v = make(45, groups=4)
    expected = ops.attention_with_importance(q, k, v, measure, True, 0.25)
    fused = torch.stack((q, k, v), dim=3).flatten(2, 3).unflatten(2, (4, 3))  # as a fused projection leaves them
    strided = [fused[:, :, :, i].detach().requires_grad_() for i in range(3)]
    transposed = [t.transpose(0, 3).contiguous().transpose(0, 3).requires_grad_() for t in (q, k, v)]
    plain = [t.clone().requires_grad_() for t in (q, k, v)]
    sums = []
    for inputs in (strided, transposed, plain):
        out, importance = ops.attention_with_importance(inputs[0], inputs[1], inputs[2], measure, True, 0.25)
        assert torch.equal(out, expected[0])
        assert torch.equal(importance, expected[1])
        sums.append(torch.autograd.grad(out.sum(), inputs))  # an expanded gradient
    for grads in sums[:2]:
        for ours, theirs in zip(grads, sums[2], strict=True):
            torch.testing.assert_close(ours, theirs)


def test_the_first_token_sees_itself_only():
    q, k, v = make()
    heads = torch.full((2,), 4.0)
    for measure, expected in (("self_weight", heads), ("row_max", heads), ("row_entropy", torch.zeros(2))):
        out, importance = ops.attention_with_importance(q, k, v, measure, True, 0.25)
        assert torch.equal(importance[0], expected)
        assert torch.equal(out[0], v[0].repeat_interleave(2, dim=1))


def test_entropy_of_even_attention_is_one_for_each_head():
    _, k, v = make(9, 3, heads=3, batch=1)
    _, entropy = ops.attention_with_importance(torch.zeros_like(k), k, v, "row_entropy", True, 1.0)
    torch.testing.assert_close(entropy[1:], torch.full((8, 1), 3.0))


def test_columns_share_out_one_weight_a_query_and_head():
    q, k, v = make(100)
    valid = padding(2, 100)
    _, received = ops.attention_with_importance(q, k, v, "col_sum", False, 0.25, valid)
    torch.testing.assert_close(received.sum(dim=0), 4.0 * valid.sum(dim=1))


def test_scores_far_apart_neither_overflow_nor_vanish():
    q, k, v = make(64, 4, 16, batch=1)
    out, entropy = ops.attention_with_importance(100 * q, 100 * k, v, "row_entropy", True, 1.0)
    expected, _ = reference.attention(100 * q.double(), 100 * k.double(), v.double(), True, 1.0)
    torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)  # scores of 1e5 have steps of 1e-2
    assert (entropy >= 0).all()
    assert entropy.isfinite().all()


@by_measure
@by_dtype
def test_importance_has_no_gradient(measure, dtype):
    q, k, v = (t.requires_grad_() for t in make(dtype=dtype))
    out, importance = ops.attention_with_importance(q, k, v, measure, True, 0.25)
    assert out.requires_grad
    assert not importance.requires_grad
    assert importance.dtype == torch.float32


@by_measure
def test_an_empty_sequence_gives_an_empty_result(measure):
    q, k, v = (t[:0].requires_grad_() for t in make())
    out, importance = ops.attention_with_importance(q, k, v, measure, True, 1.0)
    assert out.shape == q.shape
    assert importance.shape == (0, 2)
    assert [g.shape for g in torch.autograd.grad(out.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]


def _allocated(seq: int, measure: str) -> int:
    q, k, v = make(seq, 1, 16, batch=1, heads=1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        ops.attention_with_importance(q, k, v, measure, False, 0.25)
    events = watched.events()
    assert events is not None
    return sum(max(event.self_cpu_memory_usage, 0) for event in events)


@by_measure
def test_memory_grows_as_the_sequence_and_not_as_its_square(measure):
    short, long = _allocated(1024, measure), _allocated(4096, measure)
    assert short > 0
    assert long < 4.5 * short
    assert long < 4096 * 4096


def test_what_does_not_fit_is_refused_with_the_numbers():
    q, k, v = make()
    attend = ops.attention_with_importance
    with pytest.raises(ValueError, match="'colmax'; legal values are"):
        attend(q, k, v, "colmax", True, 1.0)
    with pytest.raises(ValueError, match="measure is 'colmax'; it must be self_weight"):
        LIBRARY.attention_forward(q, k, v, "colmax", True, 1.0, None)
    with pytest.raises(ValueError, match="multiple of G"):
        attend(q, torch.randn(37, 2, 3, 16), torch.randn(37, 2, 3, 16), "row_max", True, 1.0)
    with pytest.raises(ValueError, match=r"v is .*it must be as k"):
        attend(q, k, v[:36], "row_max", True, 1.0)
    with pytest.raises(ValueError, match="q must have 4 dimensions"):
        attend(q[0], k, v, "row_max", True, 1.0)
    with pytest.raises(ValueError, match="k must be Float"):
        attend(q, k.bfloat16(), v, "row_max", True, 1.0)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        attend(q.double(), k.double(), v.double(), "row_max", True, 1.0)
    with pytest.raises(ValueError, match="scale is 0; it must be above zero"):
        attend(q, k, v, "row_max", True, 0.0)
    with pytest.raises(ValueError, match=r"valid is \[37, 2\], it must be \[B, S\] = \[2, 37\]"):
        attend(q, k, v, "row_max", True, 1.0, torch.ones(37, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"lse is \[2, 4, 36\], it must be \[B, H, S\]"):
        LIBRARY.importance_from_lse(q, k, torch.zeros(2, 4, 36), "col_sum", True, 1.0, None)


@pytest.mark.parametrize("padded", [True, False])
def test_operators_obey_the_rules_of_the_dispatcher(padded):
    q, k, v = (t.requires_grad_() for t in make(20, width=8))
    valid = padding(2, 20) if padded else None
    torch.library.opcheck(LIBRARY.attention_forward.default, (q, k, v, "row_max", True, 0.3, valid))
    q, k, v = (t.detach() for t in (q, k, v))
    lse = LIBRARY.attention_forward(q, k, v, "row_max", True, 0.3, valid)[1]
    torch.library.opcheck(LIBRARY.importance_from_lse.default, (q, k, lse, "col_sum", True, 0.3, valid))


NARROWER = """
import sys
sys.path.insert(0, sys.argv[1])
import test_importance as tests
for dtype in tests.DTYPES:
    cases = [(measure, 33, 16, True) for measure in tests.MEASURES]
    for measure, seq, width, causal in (*cases, ("row_max", 1, 3, True), ("col_sum", 400, 9, False)):
        q, k, v = tests.make(seq, 2, width, dtype=dtype)
        tests.check(q, k, v, measure, causal, 0.2)
        tests.check(q, k, v, measure, causal, 0.2, tests.padding(2, seq))
print(tests.ops.extension_info().cpu_isa)
"""


@pytest.mark.skipif(ops.extension_info().cpu_isa == "base", reason="this CPU has no wider instructions to leave out")
@pytest.mark.parametrize("isa", ["avx512", "avx2", "base"])
def test_narrower_instruction_sets_agree(isa):
    run = subprocess.run(
        [sys.executable, "-c", NARROWER, str(Path(__file__).parent)],
        env={**os.environ, "MOETRAIN_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == isa
