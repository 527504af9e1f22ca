"""Importance from a log-sum-exp on a GPU, held to the whole attention matrix in double.

Legend: S sequence, B batch, H query heads, G key heads, d head dimension.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moetrain import ops
from moetrain.ops import reference
from moetrain.ops.cases import DTYPES

DEVICE = "cuda"
pytestmark = pytest.mark.usefixtures("poison")

ROW_MEASURES = ("self_weight", "row_max", "row_entropy")
MEASURES = (*ROW_MEASURES, "col_max", "col_sum")
# S, B, H, G, d: around tiles of 64 and 128 tokens, head dimensions of 16 bytes or not, of one panel or several
SHAPES = ((1, 1, 1, 1, 8), (37, 2, 4, 2, 16), (130, 1, 2, 1, 40), (257, 1, 2, 2, 33), (70, 2, 8, 2, 136))
SCALE = 0.25
by_measure = pytest.mark.parametrize("measure", MEASURES)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    seq, batch, heads, groups, width = shape
    torch.manual_seed(seq)
    qk = torch.randn(seq, batch, heads + groups, width).to(dtype).to(DEVICE)
    return qk[:, :, :heads], qk[:, :, heads:]  # views, as attention has them


def weights_of(q: Tensor, k: Tensor, causal: bool, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Attention weights [B, H, S, S] of real queries, their log-sum-exp and which keys are visible, in double."""
    seq = q.size(0)
    k = k.double().repeat_interleave(q.size(2) // k.size(2), dim=2)
    scores = torch.einsum("ibhd,jbhd->bhij", q.double(), k) * SCALE
    visible = torch.ones(seq, seq, dtype=torch.bool, device=DEVICE)
    visible = (visible.tril() if causal else visible).expand_as(scores)
    if valid is not None:
        visible = visible & valid[:, None, None, :]
    scores = scores.masked_fill(~visible, -math.inf)
    lse = scores.logsumexp(dim=-1)
    p = (scores - lse[..., None]).exp().nan_to_num(0.0)
    return p if valid is None else p * valid[:, None, :, None], lse.float(), visible


def exact(p: Tensor, visible: Tensor, measure: str) -> Tensor:
    if measure == "self_weight":
        per_head = p.diagonal(dim1=-2, dim2=-1)
    elif measure == "row_max":
        per_head = p.amax(dim=-1)
    elif measure == "row_entropy":
        keys = visible.sum(dim=-1)
        entropy = -torch.xlogy(p, p).sum(dim=-1) / keys.double().log().clamp(min=1e-9)
        per_head = entropy.masked_fill(keys <= 1, 0.0)
    else:
        per_head = p.amax(dim=-2) if measure == "col_max" else p.sum(dim=-2)
    return per_head.sum(dim=1).T


@by_measure
@by_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_measure_is_that_of_the_whole_matrix(measure, dtype, shape, causal, padded):
    q, k = make(shape, dtype)
    valid = (torch.rand(shape[1], shape[0]) < 0.7).to(DEVICE) if padded else None
    p, lse, visible = weights_of(q, k, causal, valid)
    ours = torch.ops.moetrain.importance_from_lse(q, k, lse, measure, causal, SCALE, valid)
    torch.testing.assert_close(ours.double(), exact(p, visible, measure), rtol=1e-4, atol=1e-5)
    if valid is not None:
        assert (ours[~valid.T] == 0).all()


@pytest.mark.parametrize("measure", ROW_MEASURES)
@by_dtype
@pytest.mark.parametrize("cut", [1, 64, 65, 100, 200])
def test_causal_measures_do_not_see_the_future_to_the_bit(measure, dtype, cut):
    q, k = make((257, 1, 2, 1, 24), dtype)
    _, lse, _ = weights_of(q, k, True, None)
    run = torch.ops.moetrain.importance_from_lse
    before = run(q, k, lse, measure, True, SCALE, None)
    shorter = run(q[:cut], k[:cut], lse[..., :cut], measure, True, SCALE, None)
    assert torch.equal(before[:cut], shorter)
    q[cut:], k[cut:] = 7, 9
    assert torch.equal(before[:cut], run(q, k, lse, measure, True, SCALE, None)[:cut])


@by_measure
@by_dtype
def test_two_runs_give_the_same_bits(measure, dtype):
    q, k = make((500, 2, 8, 2, 64), dtype)
    _, lse, _ = weights_of(q, k, True, None)
    run = torch.ops.moetrain.importance_from_lse
    once, again = (run(q, k, lse, measure, True, SCALE, None) for _ in range(2))
    assert torch.equal(once, again)


def test_memory_grows_with_the_length_not_with_its_square():
    run = torch.ops.moetrain.importance_from_lse
    peaks = []
    for seq in (1024, 4096):
        q, k = make((seq, 1, 4, 4, 64), torch.bfloat16)
        lse = torch.zeros(1, 4, seq, device=DEVICE)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(q, k, lse, "col_sum", True, SCALE, None)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 4 * peaks[0]


@by_measure
@by_dtype
@pytest.mark.parametrize("padded", [False, True])
def test_attention_with_importance_matches_the_reference(measure, dtype, padded):
    q, k = make((130, 2, 4, 2, 16), dtype)
    valid = (torch.rand(2, 130) < 0.7).to(DEVICE) if padded else None
    expected = reference.attention_importance(q.float(), k.float(), measure, True, SCALE, valid)
    _, ours = ops.attention_with_importance(q, k, k, measure, True, SCALE, valid)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


@by_measure
def test_float16_is_measured_as_float32(measure):
    q, k = make(SHAPES[1], torch.float16)
    _, lse, _ = weights_of(q, k, True, None)
    run = torch.ops.moetrain.importance_from_lse
    wide = run(q.float(), k.float(), lse, measure, True, SCALE, None)
    assert torch.equal(run(q, k, lse, measure, True, SCALE, None), wide)


def test_an_unknown_measure_is_refused():
    q, k = make(SHAPES[0], torch.float32)
    with pytest.raises(ValueError, match="measure is 'mean'; legal values are"):
        torch.ops.moetrain.importance_from_lse(q, k, torch.zeros(1, 1, 1, device=DEVICE), "mean", True, SCALE, None)


def test_a_log_sum_exp_of_another_shape_is_refused():
    q, k = make(SHAPES[1], torch.float32)
    with pytest.raises(ValueError, match="lse has shape"):
        torch.ops.moetrain.importance_from_lse(q, k, torch.zeros(37, 2, 4, device=DEVICE), "row_max", True, SCALE, None)


@by_measure
def test_operator_obeys_the_rules_of_the_dispatcher(measure):
    q, k = make(SHAPES[1], torch.float32)
    _, lse, _ = weights_of(q, k, True, None)
    torch.library.opcheck(torch.ops.moetrain.importance_from_lse.default, (q, k, lse, measure, True, SCALE, None))
