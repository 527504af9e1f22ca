"""Our subclasses of Megatron's modules, each for one reason."""

from __future__ import annotations

from typing import cast

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from moetrain.model.attention import ImportanceAttention


class ParallelRMSNorm(nn.Module):
    """RMSNorm whose weight knows about sequence parallelism (Megatron's plain-torch norm refuses it)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class MoETransformerLayer(TransformerLayer):
    """A transformer layer whose MLP slot also receives, from this layer's attention, the tokens' importance and which
    of them are real."""

    def _forward_mlp(
        self, hidden_states: Tensor, inference_context: object = None, padding_mask: Tensor | None = None
    ) -> Tensor:
        normed = self._forward_pre_mlp_layernorm(hidden_states)
        attention = self.self_attention.core_attention
        assert isinstance(attention, ImportanceAttention)
        output = self.mlp(normed, attention.take_importance(), attention.take_valid())
        result = self._forward_post_mlp((output, None), hidden_states)
        assert isinstance(result, Tensor)
        return result


class Decoder(GPTModel):
    """A chunk of the model: of a decoder, or of an encoder, which differs in the mask of its attention alone and keeps
    the names of the parameters.

    A GPTModel whose tied weights start equal by seeded initialisation and are summed by our optimizer, so Megatron's
    own start-up all-reduce of the embedding (which also moves it to CUDA) has nothing to do."""

    def setup_embeddings_and_output_layer(self) -> None: ...


def global_layers(decoder: Decoder) -> list[int]:
    """0-based global numbers of the chunk's layers; Megatron counts from 1."""
    layers = (cast(TransformerLayer, layer) for layer in decoder.decoder.layers)
    return [layer.layer_number - 1 for layer in layers]
