"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434 section 2.1) in Megatron's slot for self-attention.

Megatron-core 0.16.1 has a module for it, but without Transformer Engine its gradients are wrong on several tensor
ranks: all heads share the rotated part of the key, each rank has some of the heads, and nothing sums what they send
back.

Legend: S sequence positions of all tensor ranks, s those of this rank (fewer with sequence parallelism), B sequences,
D hidden size, H local heads, q and v widths of a head's query (and key) and value, r the part of q that rotates, n the
other part, L width of a latent.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from moetrain.config.attention import MultiLatentAttentionConfig
from moetrain.model.decoder import ParallelRMSNorm
from moetrain.model.rotary import RotaryPositions


class LatentAttention(nn.Module):
    """Tensor ranks split the heads: the projections from the latents, and the output projection. Every rank has the
    small projections to the latents and their norms whole, and applies them to the tokens that it holds: with sequence
    parallelism its own part, and what travels between ranks are latents."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        settings: MultiLatentAttentionConfig,
        positions: RotaryPositions,
        core_attention: ModuleSpec,
        tensor_group: dist.ProcessGroup,
        pg_collection: object = None,
    ) -> None:
        """Megatron passes `config`, `layer_number` and `pg_collection`; the others come from the module spec."""
        super().__init__()
        self.settings, self.positions, self.tensor_group = settings, positions, tensor_group
        self.sequence_parallel = config.sequence_parallel
        hidden, heads, dtype = config.hidden_size, config.num_attention_heads, config.params_dtype
        parallel = {"config": config, "init_method": config.init_method, "bias": False, "tp_group": tensor_group}
        self.heads = heads // tensor_group.size()

        def split_by_heads(width_in: int, of_head: int) -> ColumnParallelLinear:
            return ColumnParallelLinear(width_in, heads * of_head, gather_output=False, **parallel)

        def norm(width: int) -> ParallelRMSNorm:
            return ParallelRMSNorm(config, width, settings.layernorm_epsilon)

        latent, rotated = settings.kv_lora_rank, settings.qk_pos_emb_head_dim
        if settings.q_lora_rank is None:
            self.linear_q_proj = split_by_heads(hidden, settings.qk_width)
        else:
            self.linear_q_down_proj = _whole_linear(hidden, settings.q_lora_rank, dtype)
            self.q_layernorm = norm(settings.q_lora_rank)
            self.linear_q_up_proj = split_by_heads(settings.q_lora_rank, settings.qk_width)
        self.linear_kv_down_proj = _whole_linear(hidden, latent + rotated, dtype)
        self.kv_layernorm = norm(latent)
        self.linear_kv_up_proj = split_by_heads(latent, settings.qk_head_dim + settings.v_head_dim)
        self.core_attention = build_module(
            core_attention,
            config=config,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type="self",
            softmax_scale=settings.qk_width**-0.5 * (1.0 if settings.yarn is None else settings.yarn.score_factor),
        )
        self.linear_proj = RowParallelLinear(
            heads * settings.v_head_dim, hidden, input_is_parallel=True, skip_bias_add=True, **parallel
        )

    def forward(
        self, hidden_sBD: Tensor, attention_mask: Tensor | None, rotary_pos_emb: None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """[s, B, D] and no bias; `attention_mask` as `ImportanceAttention` takes it.

        Communication: both products with a latent, and the output, as Megatron's linear layers do it; and of the
        rotated keys [s, B, r], with sequence parallelism an all-gather and in the backward pass a reduce-scatter,
        without it an all-reduce in the backward pass alone.
        """
        assert rotary_pos_emb is None, "the model's rotary positions are not these"
        query_SBHq, key_SBHq, value_SBHv = self._query_key_value(hidden_sBD)
        width = max(self.settings.qk_width, self.settings.v_head_dim)
        padded = (F.pad(t, (0, width - t.shape[-1])) for t in (query_SBHq, key_SBHq, value_SBHv))
        # Fused attention has one width for all three. Zeros add nothing to a score, nor to the part that is kept.
        context = self.core_attention(*padded, attention_mask)
        context = context.unflatten(2, (self.heads, width))[..., : self.settings.v_head_dim].flatten(2)
        return self.linear_proj(context)

    def _query_key_value(self, hidden_sBD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        plain, rotated, of_value = (
            self.settings.qk_head_dim,
            self.settings.qk_pos_emb_head_dim,
            self.settings.v_head_dim,
        )
        if self.settings.q_lora_rank is None:
            query, _ = self.linear_q_proj(hidden_sBD)
        else:
            query, _ = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden_sBD)))
        query_SBHn, query_SBHr = query.unflatten(2, (self.heads, -1)).split((plain, rotated), dim=-1)
        latent_sBL, key_sBr = self.linear_kv_down_proj(hidden_sBD).split((self.settings.kv_lora_rank, rotated), dim=-1)
        keys_and_values, _ = self.linear_kv_up_proj(self.kv_layernorm(latent_sBL))
        key_SBHn, value_SBHv = keys_and_values.unflatten(2, (self.heads, -1)).split((plain, of_value), dim=-1)
        key_SB1r = self.positions.rotate(self._for_all_heads(key_sBr).unsqueeze(2))
        query_SBHq = torch.cat([query_SBHn, self.positions.rotate(query_SBHr)], dim=-1)
        key_SBHq = torch.cat([key_SBHn, key_SB1r.expand(-1, -1, self.heads, -1)], dim=-1)
        return query_SBHq, key_SBHq, value_SBHv

    def _for_all_heads(self, key_sBr: Tensor) -> Tensor:
        """The rotated keys of the whole sequence, [S, B, r], with the gradient of the heads of all tensor ranks."""
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(key_sBr, group=self.tensor_group)
        return copy_to_tensor_model_parallel_region(key_sBr, self.tensor_group)


def _whole_linear(width_in: int, width_out: int, dtype: torch.dtype) -> nn.Linear:
    """Unsplit, and not filled: `initialize` does that."""
    linear = nn.utils.skip_init(nn.Linear, width_in, width_out, bias=False, dtype=dtype)
    assert isinstance(linear, nn.Linear)
    return linear
