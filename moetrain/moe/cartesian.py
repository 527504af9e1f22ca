"""Two mixtures in a row, so that a token's experts are pairs (CartesianMoE, arXiv 2410.16077).

Legend: S sequence positions of this rank, B sequences of the micro-batch, D hidden size, P size of a router's state.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from moetrain.config.moe import MoEConfig
from moetrain.moe.layer import MoELayer


class CartesianMoE(nn.Module):
    """z = A(h), y = B(LN(h + z)) where h is the normed input and A, B are `MoELayer`s with routers of their own.

    `residual: stream` gives y, to which the transformer layer adds its residual stream; `inner` gives z + y.
    """

    def __init__(self, config: TransformerConfig, moe: MoEConfig, **parts: Any) -> None:
        """`parts`: the other arguments of `MoELayer`."""
        super().__init__()
        assert moe.cartesian is not None
        self.first = MoELayer(config, moe=moe, **parts, sublayer=0)
        self.second = MoELayer(config, moe=moe, **parts, sublayer=1)
        self.inner = moe.cartesian.residual == "inner"
        self.layernorm = _Norm(config)

    def forward(
        self,
        x_SBD: Tensor,
        importance_SB: Tensor | None,
        valid_SB: Tensor | None = None,
        *,
        token_ids_SB: Tensor | None = None,
        state_SBP: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `MoELayer`'s; the routers' state passes through both."""
        of_tokens = (importance_SB, valid_SB)
        z_SBD, state_SBP = self.first(x_SBD, *of_tokens, token_ids_SB=token_ids_SB, state_SBP=state_SBP)
        normed_SBD = self.layernorm(x_SBD + z_SBD)
        y_SBD, state_SBP = self.second(normed_SBD, *of_tokens, token_ids_SB=token_ids_SB, state_SBP=state_SBP)
        return (z_SBD + y_SBD if self.inner else y_SBD), state_SBP


class _Norm(nn.Module):
    """The model's RMSNorm."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.layernorm_epsilon
        self.weight = nn.Parameter(torch.empty(config.hidden_size, dtype=config.params_dtype))

    def forward(self, x_SBD: Tensor) -> Tensor:
        return F.rms_norm(x_SBD, self.weight.shape, self.weight, self.eps)
