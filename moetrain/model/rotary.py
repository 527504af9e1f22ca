"""Rotary positions of a part of each head, plain or stretched (YaRN, arXiv 2309.00071).

Legend: S sequence positions, B sequences, H heads, r rotated width of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moetrain.config.attention import MultiLatentAttentionConfig, YarnConfig


class RotaryPositions:
    """Rotates heads by their positions, which are counted from 0. Without parameters; all layers of a rank share it."""

    def __init__(self, settings: MultiLatentAttentionConfig, base: float) -> None:
        width = settings.qk_pos_emb_head_dim
        self.interleaved = settings.rotary_interleaved
        self.frequencies = frequencies(width, base, settings.yarn)
        self.factor = 1.0 if settings.yarn is None else settings.yarn.rotated_factor
        self._turns = (torch.empty(0), torch.empty(0))

    def rotate(self, x_SBHr: Tensor) -> Tensor:
        """[S, B, H, r] in the dtype of `x_SBHr`, computed in fp32. Where neighbors rotate together they come out half a
        width apart: queries and keys alike, so no score changes."""
        cos_S11h, sin_S11h = self._cos_sin(x_SBHr.shape[0], x_SBHr.device)
        x = x_SBHr.float()
        first, second = (x[..., 0::2], x[..., 1::2]) if self.interleaved else x.chunk(2, dim=-1)
        rotated = [first * cos_S11h - second * sin_S11h, second * cos_S11h + first * sin_S11h]
        return torch.cat(rotated, dim=-1).to(x_SBHr.dtype)

    def _cos_sin(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """[S, 1, 1, r / 2] each, kept for the next layer."""
        if self._turns[0].shape[0] != length or self._turns[0].device != device:
            angles = torch.outer(torch.arange(length, dtype=torch.float32), self.frequencies)[:, None, None, :]
            self._turns = (self.factor * angles.cos()).to(device), (self.factor * angles.sin()).to(device)
        return self._turns


def frequencies(width: int, base: float, yarn: YarnConfig | None) -> Tensor:
    """Radians per token of each pair, fp32 [width / 2].

    In fp32 as transformers has them, because at far positions an imported model means these very angles. Stretched,
    pairs between the fast and the slow ones go over from one to the other in equal steps.
    """
    fast = 1.0 / base ** (torch.arange(0, width, 2).float() / width)
    if yarn is None:
        return fast
    slow = 1.0 / (yarn.factor * base ** (torch.arange(0, width, 2).float() / width))
    first = max(math.floor(_pair_with(yarn.beta_fast, width, base, yarn)), 0)
    last = min(math.ceil(_pair_with(yarn.beta_slow, width, base, yarn)), width - 1)
    steps = max(last - first, 0.001)
    slowness = ((torch.arange(width // 2).float() - first) / steps).clamp(0, 1)
    return slow * slowness + fast * (1 - slowness)


def _pair_with(rotations: float, width: int, base: float, yarn: YarnConfig) -> float:
    """The pair, as a real number, that rotates so often over the original length."""
    return width * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(base))
