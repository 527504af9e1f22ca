"""Our subclasses of Megatron's modules, each for one reason."""

from __future__ import annotations

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch.nn import functional as F


class ParallelRMSNorm(nn.Module):
    """RMSNorm whose weight knows about sequence parallelism (Megatron's plain-torch norm refuses it)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class MoETransformerLayer(TransformerLayer):
    """A transformer layer whose MLP slot also receives the tokens' importance from this layer's attention."""

    def _forward_mlp(
        self, hidden_states: Tensor, inference_context: object = None, padding_mask: Tensor | None = None
    ) -> Tensor:
        normed = self._forward_pre_mlp_layernorm(hidden_states)
        output = self.mlp(normed, self.self_attention.core_attention.take_importance())
        return self._forward_post_mlp((output, None), hidden_states)


class Decoder(GPTModel):
    """GPTModel whose tied weights start equal by seeded initialisation and are summed by our optimizer, so Megatron's
    own start-up all-reduce of the embedding (which also moves it to CUDA) has nothing to do."""

    def setup_embeddings_and_output_layer(self) -> None: ...
