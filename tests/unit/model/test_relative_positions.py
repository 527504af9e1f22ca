"""Buckets of distances, and attention with a bias, against the equations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersAttention

from moetrain.model.relative_positions import biased_attention, bucket_of
from moetrain.ops import CAUSAL_MEASURES, NONCAUSAL_MEASURES, attention_with_importance, reference, weights_importance

SEQ, BATCH, HEADS, GROUPS, WIDTH = 21, 3, 4, 2, 8
MEASURES = sorted(CAUSAL_MEASURES | NONCAUSAL_MEASURES)
# The last sequence is padding alone.
VALID = torch.arange(SEQ) < torch.tensor([SEQ, 9, 0])[:, None]


@pytest.mark.parametrize(
    ("buckets", "max_distance", "both"), [(32, 128, True), (32, 128, False), (6, 20, True), (7, 9, False)]
)
def test_buckets_are_those_of_t5(buckets: int, max_distance: int, both: bool) -> None:
    distance = torch.arange(-600, 601)
    mine = bucket_of(distance, buckets, max_distance, both)
    theirs = SwitchTransformersAttention._relative_position_bucket(distance, both, buckets, max_distance)
    assert torch.equal(mine, theirs)
    for d, row in zip(distance.tolist(), mine.tolist(), strict=True):
        per_direction, n = (buckets // 2, abs(d)) if both else (buckets, max(-d, 0))
        first = per_direction if both and d > 0 else 0
        exact = per_direction // 2
        if n < exact:
            assert row == first + n
        else:
            real = exact + math.log(n / exact) / math.log(max_distance / exact) * (per_direction - exact)
            # Where the equation gives a whole number, T5's fp32 decides.
            wanted = {min(math.floor(real + e), per_direction - 1) for e in (-1e-5, 1e-5)}
            assert row - first in wanted


def inputs(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(SEQ, BATCH, HEADS, WIDTH), (SEQ, BATCH, GROUPS, WIDTH), (SEQ, BATCH, GROUPS, WIDTH), (HEADS, SEQ, SEQ)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def truth(tensors: list[torch.Tensor], causal: bool, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Context [S, B, H, d] and weights [B, H, S, S], in float64, one row at a time."""
    q, k, v, bias = (t.detach().double().numpy() for t in tensors)
    context, weights = np.zeros(q.shape), np.zeros((BATCH, HEADS, SEQ, SEQ))
    for b in range(BATCH):
        for h in range(HEADS):
            for i in np.flatnonzero(valid[b]):
                seen = [j for j in range(i + 1 if causal else SEQ) if valid[b, j]]
                scores = np.array([q[i, b, h] @ k[j, b, h // 2] / math.sqrt(WIDTH) + bias[h, i, j] for j in seen])
                share = np.exp(scores - scores.max())
                weights[b, h, i, seen] = share / share.sum()
                context[i, b, h] = weights[b, h, i] @ v[:, b, h // 2]
    return context, weights


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("measure", [None, *MEASURES])
def test_attention_and_importance_are_those_of_scores_with_the_bias(measure: str | None, causal: bool) -> None:
    tensors = inputs()
    for valid in (None, VALID):
        context, importance = biased_attention(*tensors, measure, causal, WIDTH**-0.5, valid)
        known = np.ones((BATCH, SEQ), dtype=bool) if valid is None else valid.numpy()
        wanted, weights = truth(tensors, causal, known)
        np.testing.assert_allclose(context.detach().numpy(), wanted, atol=2e-6)
        if measure is None:
            assert importance is None
            continue
        seen = np.maximum((weights > 0).sum(-1), 2)
        entropy = -(weights * np.log(np.where(weights > 0, weights, 1))).sum(-1) / np.log(seen)
        by_measure = {
            "self_weight": np.diagonal(weights, axis1=2, axis2=3),
            "row_max": weights.max(3),
            "row_entropy": entropy,
            "col_max": weights.max(2),
            "col_sum": weights.sum(2),
        }
        assert importance is not None and not importance.requires_grad
        np.testing.assert_allclose(importance.numpy(), by_measure[measure].sum(1).T, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("measure", [None, "row_max"])
def test_gradients_are_those_of_the_specification_and_reach_the_bias(measure: str | None) -> None:
    """The bias as further columns of queries and keys, of which the specification knows nothing else."""
    tensors = inputs()
    q, k, v, bias = tensors
    context, _ = biased_attention(*tensors, measure, False, WIDTH**-0.5, VALID)
    grad = torch.randn(context.shape, generator=torch.Generator().manual_seed(1))
    mine = torch.autograd.grad(context, tensors, grad)
    rows = bias.permute(1, 0, 2)[:, None].expand(-1, BATCH, -1, -1) * WIDTH**0.5
    one_hot = torch.eye(SEQ)[:, None, None].expand(-1, BATCH, HEADS, -1)
    keys = torch.cat([k.repeat_interleave(2, dim=2), one_hot], dim=3)
    wanted, _ = reference.attention(torch.cat([q, rows], 3), keys, v, False, WIDTH**-0.5, VALID)
    for ours, theirs in zip(mine, torch.autograd.grad(wanted, tensors, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("measure", MEASURES)
def test_without_a_bias_it_is_the_operator(measure: str) -> None:
    q, k, v, bias = inputs()
    for causal, valid in ((True, None), (False, VALID)):
        mine = biased_attention(q, k, v, torch.zeros_like(bias), measure, causal, WIDTH**-0.5, valid)
        theirs = attention_with_importance(q, k, v, measure, causal, WIDTH**-0.5, valid)
        for ours, operators in zip(mine, theirs, strict=True):
            torch.testing.assert_close(ours, operators, rtol=1e-5, atol=1e-5)


def test_bf16_and_padding_alone_give_numbers() -> None:
    tensors = inputs(torch.bfloat16)
    for measure in (None, "col_max"):
        context, _ = biased_attention(*tensors, measure, True, WIDTH**-0.5, VALID)
        assert context.dtype == torch.bfloat16 and context.isfinite().all()
        assert not context[:, 2].any()
        assert all(g.isfinite().all() for g in torch.autograd.grad(context.sum(), tensors))


def test_an_unknown_measure_is_an_error() -> None:
    with pytest.raises(ValueError, match="legal values are"):
        weights_importance(torch.ones(1, 1, 2, 2) / 2, "row_min", causal=False)
