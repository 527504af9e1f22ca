"""The attention core: the same attention with and without a measure, and what it hands to the router."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from moetrain.model.attention import ImportanceAttention
from moetrain.ops import CAUSAL_MEASURES, NONCAUSAL_MEASURES, reference

HEADS, GROUPS, WIDTH, SEQ, BATCH = 4, 2, 8, 21, 2


@pytest.fixture(scope="module")
def alone() -> Iterator[dist.ProcessGroup]:
    """A tensor group of one rank."""
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(minutes=1))
    group = dist.group.WORLD
    assert group is not None
    yield group
    dist.destroy_process_group()


def core(measure: str | None, group: dist.ProcessGroup, mask: object = None) -> ImportanceAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=WIDTH,
    )
    return ImportanceAttention(config, 1, mask, "self", measure, group)


def inputs() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(SEQ, BATCH, heads, WIDTH, requires_grad=True) for heads in (HEADS, GROUPS, GROUPS)]


@pytest.mark.parametrize("measure", sorted(CAUSAL_MEASURES))
def test_a_measure_changes_neither_the_attention_nor_its_gradients(measure: str, alone: dist.ProcessGroup) -> None:
    plain_inputs, measured_inputs = inputs(), inputs()
    plain, measured = core(None, alone)(*plain_inputs), core(measure, alone)(*measured_inputs)
    assert measured.shape == (SEQ, BATCH, HEADS * WIDTH)
    torch.testing.assert_close(measured, plain, rtol=1e-5, atol=1e-6)
    grad = torch.randn_like(plain)
    for ours, theirs in zip(
        torch.autograd.grad(measured, measured_inputs, grad),
        torch.autograd.grad(plain, plain_inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("measure", sorted(CAUSAL_MEASURES))
def test_importance_is_the_mean_over_heads_and_is_handed_out_once(measure: str, alone: dist.ProcessGroup) -> None:
    attention = core(measure, alone)
    q, k, v = inputs()
    attention(q, k, v)
    importance = attention.take_importance()
    assert importance is not None
    expected = reference.attention_importance(q, k, measure, True, WIDTH**-0.5) / HEADS
    torch.testing.assert_close(importance, expected.detach(), rtol=1e-5, atol=1e-6)
    assert not importance.requires_grad
    assert attention.take_importance() is None


def test_without_a_measure_there_is_no_importance(alone: dist.ProcessGroup) -> None:
    attention = core(None, alone)
    attention(*inputs())
    assert attention.take_importance() is None


@pytest.mark.parametrize("measure", [None, *sorted(CAUSAL_MEASURES | NONCAUSAL_MEASURES)])
def test_an_encoder_sees_all_real_tokens_and_no_padding(measure: str | None, alone: dist.ProcessGroup) -> None:
    """Attention and importance of a padded batch are those of each text alone; padding gets zeros."""
    attention = core(measure, alone, AttnMaskType.padding)
    lengths = (SEQ, 9)
    q, k, v = inputs()
    valid = torch.arange(SEQ) < torch.tensor(lengths)[:, None]
    padded = attention(q, k, v, valid)
    importance, real = attention.take_importance(), attention.take_valid()
    assert real is not None and torch.equal(real, valid.t())
    assert attention.take_valid() is None
    for i, n in enumerate(lengths):
        one_q, one_k, one_v = (t[:n, i : i + 1] for t in (q, k, v))
        text = attention(one_q, one_k, one_v)
        torch.testing.assert_close(padded[:n, i : i + 1], text, rtol=1e-5, atol=1e-6)
        assert not padded[n:, i].any()
        own = attention.take_importance()
        if measure is not None:
            assert importance is not None and own is not None
            expected = reference.attention_importance(one_q, one_k, measure, False, WIDTH**-0.5) / HEADS
            torch.testing.assert_close(importance[:n, i : i + 1], expected.detach(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(own, expected.detach(), rtol=1e-5, atol=1e-6)
            assert not importance[n:, i].any()


def test_padding_without_a_text_gives_no_nan(alone: dist.ProcessGroup) -> None:
    attention = core(None, alone, AttnMaskType.padding)
    q, k, v = inputs()
    out = attention(q, k, v, torch.zeros(BATCH, SEQ, dtype=torch.bool))
    assert not out.any()
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert not gradient.any()
