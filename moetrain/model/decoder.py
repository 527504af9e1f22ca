"""Our subclasses of Megatron's modules, each for one reason."""

from __future__ import annotations

from copy import copy
from typing import Any, cast

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
    of them are real; their vocabulary ids; and the state of the router in the layer before. It hands on the router's
    next state.

    Megatron has two places for what an encoder gives to every layer of a decoder: `context`, which a layer may change
    for the next one, and `context_mask`. It hands both through activation recompute, with gradients. Without cross
    attention they are free; here they hold the router's state and the token ids.
    """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        kwargs.pop("dynamic_inference_decode_only", None)
        hidden_states, state_SBP = self._forward_attention(*args, **kwargs)
        normed = self._forward_pre_mlp_layernorm(hidden_states)
        attention = self.self_attention.core_attention
        assert isinstance(attention, ImportanceAttention)
        output, state_SBP = self.mlp(
            normed,
            attention.take_importance(),
            attention.take_valid(),
            token_ids_SB=kwargs.get("context_mask"),
            state_SBP=state_SBP,
        )
        result = self._forward_post_mlp((output, None), hidden_states)
        assert isinstance(result, Tensor)
        return result, state_SBP


class Decoder(GPTModel):
    """A chunk of the model: of a decoder, or of an encoder, which differs in the mask of its attention alone and keeps
    the names of the parameters.

    A GPTModel whose tied weights start equal by seeded initialization and are summed by our optimizer, so Megatron's
    own start-up all-reduce of the embedding (which also moves it to CUDA) has nothing to do."""

    _state_width = 0
    _carries_token_ids = False

    def setup_embeddings_and_output_layer(self) -> None: ...

    def carry(self, state_width: int, token_ids: bool) -> None:
        """What travels beside the residual stream: the state of the routers, and token ids to every MoE layer.

        Between pipeline stages the state lies behind the stream, [S, B, D + P]: the schedules exchange one tensor, of
        the width that this module's config names. Nothing inside the chunk reads the width from there.
        """
        self._carries_token_ids, self._state_width = token_ids, state_width
        if state_width == 0:
            return
        self.config = copy(self.config)
        self.config.hidden_size += state_width
        if not self.post_process:
            self.decoder.layers[-1].register_forward_hook(self._join_state)

    def forward(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Megatron's, with what `carry` announced for every layer."""
        beside: dict[str, Tensor] = {}
        if self._carries_token_ids:
            beside["context_mask"] = input_ids.t()
        if self._state_width > 0 and not self.pre_process:
            beside["context"] = self._split_state()
        return super().forward(input_ids, *args, extra_block_kwargs=beside, **kwargs)

    def _split_state(self) -> Tensor:
        """Leaves the residual stream where Megatron looks for the former stage's output, and returns the state."""
        whole_SBX = self.decoder.input_tensor
        assert isinstance(whole_SBX, Tensor)
        stream_SBD, state_SBP = whole_SBX.split([whole_SBX.shape[-1] - self._state_width, self._state_width], dim=-1)
        self.decoder.input_tensor = stream_SBD.contiguous()
        return state_SBP.contiguous()

    def _join_state(
        self, layer: nn.Module, _: Any, output: tuple[Tensor, Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        """Hook of a stage's last layer: what leaves for the next stage is stream and state in one."""
        stream_SBD, state_SBP = output
        if state_SBP is None:  # no MoE layer so far
            state_SBP = stream_SBD.new_zeros(*stream_SBD.shape[:2], self._state_width)
        return torch.cat([stream_SBD, state_SBP], dim=-1), None


def global_layers(decoder: Decoder) -> list[int]:
    """0-based global numbers of the chunk's layers; Megatron counts from 1."""
    layers = (cast(TransformerLayer, layer) for layer in decoder.decoder.layers)
    return [layer.layer_number - 1 for layer in layers]
