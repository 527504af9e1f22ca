"""Norms of queries and keys, in the places that Megatron's attention has for them.

Legend: S sequence positions, B sequences, H local heads, d head width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from moetrain.model.decoder import ParallelRMSNorm


class ProjectionRMSNorm(nn.Module):
    """RMSNorm over all heads together (OLMoE, arXiv 2409.02060), of which a tensor rank has some, and their weights."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float, heads: int, tensor_group: dist.ProcessGroup
    ) -> None:
        """`hidden_size` is a head's, which Megatron passes with `config` and `eps`; `heads` counts the local ones."""
        super().__init__()
        self.eps, self.tensor_group = eps, tensor_group
        self.width = heads * hidden_size * tensor_group.size()
        self.weight = nn.Parameter(torch.empty(heads * hidden_size, dtype=config.params_dtype))

    def forward(self, x_SBHd: Tensor) -> Tensor:
        """Communication: an all-reduce of [S, B] fp32 over the tensor ranks, forward and backward."""
        x_SBX = x_SBHd.flatten(2).float()
        total_SB1 = x_SBX.square().sum(dim=-1, keepdim=True)
        if self.tensor_group.size() > 1:
            # Every rank goes on with the sum, so its gradient is the sum of theirs.
            total_SB1 = reduce_from_tensor_model_parallel_region(total_SB1, self.tensor_group)
            total_SB1 = copy_to_tensor_model_parallel_region(total_SB1, self.tensor_group)
        normed_SBX = x_SBX * torch.rsqrt(total_SB1 / self.width + self.eps)
        return (normed_SBX.to(x_SBHd.dtype) * self.weight).view_as(x_SBHd)


def qk_norm(kind: Literal["head", "projection"] | None, heads: int, tensor_group: dist.ProcessGroup) -> ModuleSpec:
    """What stands in a norm's place; `heads` are those of the whole model."""
    if kind is None:
        return ModuleSpec(module=IdentityOp)
    if kind == "head":
        return ModuleSpec(module=ParallelRMSNorm)
    local = heads // tensor_group.size()
    return ModuleSpec(module=ProjectionRMSNorm, params={"heads": local, "tensor_group": tensor_group})
