"""Attention importance against the whole matrix, and the proof that the causal measures see no future."""

from __future__ import annotations

import pytest
import torch

from moetrain import ops
from moetrain.ops import importance, reference

MEASURES = sorted(ops.CAUSAL_MEASURES | ops.NONCAUSAL_MEASURES)
by_measure = pytest.mark.parametrize("measure", MEASURES)


@pytest.fixture(params=[1, 7, 1 << 22], ids=lambda size: f"block{size}")
def block_rows(request, monkeypatch):
    """Sets the block to about so many queries of the test's tensors (2 sequences, 4 heads, 37 tokens)."""
    monkeypatch.setattr(importance, "BLOCK_SCORES", request.param * 2 * 4 * 37)


def make(seq: int = 37, groups: int = 2):
    torch.manual_seed(seq)
    return torch.randn(seq, 2, 4, 16), torch.randn(seq, 2, groups, 16)


@by_measure
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_blocks_give_what_the_whole_matrix_gives(measure, causal, groups, block_rows):
    q, k = make(groups=groups)
    ours = ops.attention_importance(q, k, measure, causal, 0.25)
    assert ours.shape == (37, 2)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, reference.attention_importance(q, k, measure, causal, 0.25))


@pytest.mark.parametrize("measure", sorted(ops.CAUSAL_MEASURES))
@pytest.mark.parametrize("first_changed", [1, 7, 8, 14, 20, 36])
def test_causal_measures_do_not_see_the_future(measure, first_changed, block_rows):
    q, k = make()
    before = ops.attention_importance(q, k, measure, True, 0.25)
    q[first_changed:] = 5 * torch.randn_like(q[first_changed:])
    k[first_changed:] = 5 * torch.randn_like(k[first_changed:])
    after = ops.attention_importance(q, k, measure, True, 0.25)
    assert torch.equal(before[:first_changed], after[:first_changed])
    assert not torch.equal(before[first_changed:], after[first_changed:])


def test_col_max_sees_the_future(block_rows):
    q, k = make()
    before = ops.attention_importance(q, k, "col_max", True, 0.25)
    q[20:] = 5 * torch.randn_like(q[20:])
    assert not torch.equal(before[:20], ops.attention_importance(q, k, "col_max", True, 0.25)[:20])


def test_the_first_token_sees_itself_only():
    q, k = make()
    heads = torch.full((2,), 4.0)
    assert torch.equal(ops.attention_importance(q, k, "self_weight", True, 0.25)[0], heads)
    assert torch.equal(ops.attention_importance(q, k, "row_max", True, 0.25)[0], heads)
    assert torch.equal(ops.attention_importance(q, k, "row_entropy", True, 0.25)[0], torch.zeros(2))


def test_entropy_of_even_attention_is_one_for_each_head():
    q, k = torch.zeros(9, 1, 3, 8), torch.randn(9, 1, 3, 8)
    entropy = ops.attention_importance(q, k, "row_entropy", True, 1.0)
    torch.testing.assert_close(entropy[1:], torch.full((8, 1), 3.0))


@by_measure
def test_no_gradient_flows_and_low_precision_is_accepted(measure):
    q, k = make()
    q = q.bfloat16().requires_grad_()
    result = ops.attention_importance(q, k.bfloat16(), measure, True, 0.25)
    assert not result.requires_grad
    assert result.dtype == torch.float32


@by_measure
def test_an_empty_sequence_gives_an_empty_result(measure):
    assert ops.attention_importance(torch.empty(0, 2, 4, 8), torch.empty(0, 2, 2, 8), measure, True, 1.0).shape == (
        0,
        2,
    )


def test_unknown_measures_and_misfit_shapes_are_refused():
    q, k = make()
    with pytest.raises(ValueError, match="'colmax'; legal values are"):
        ops.attention_importance(q, k, "colmax", True, 1.0)
    with pytest.raises(ValueError, match="multiple of the key heads"):
        ops.attention_importance(q, torch.randn(37, 2, 3, 16), "row_max", True, 1.0)
    with pytest.raises(ValueError, match=r"\[S, B, heads, d\]"):
        ops.attention_importance(q[0], k, "row_max", True, 1.0)
