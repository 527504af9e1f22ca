"""Pooling of padded hidden states."""

from __future__ import annotations

import pytest
import torch

from moetrain.model.sequence_head import pool

LENGTHS = torch.tensor([5, 2, 0])
VALID = torch.arange(6) < LENGTHS[:, None]


def states() -> torch.Tensor:
    hidden = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0))
    return hidden.masked_fill(~VALID.t()[..., None], torch.nan)  # whatever padding holds, it must not matter


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_only_real_tokens_are_pooled_and_nothing_gives_zeros(pooling: str) -> None:
    hidden = states()
    pooled = pool(hidden.bfloat16(), VALID, pooling)
    assert pooled.dtype == torch.float32
    expected = {
        "mean": [hidden[:5, 0].mean(0), hidden[:2, 1].mean(0)],
        "first": [hidden[0, 0], hidden[0, 1]],
        "last": [hidden[4, 0], hidden[1, 1]],
    }[pooling]
    torch.testing.assert_close(pooled[:2], torch.stack(expected), rtol=1e-2, atol=1e-2)
    assert not pooled[2].any()
