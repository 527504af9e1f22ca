"""The transformer around the blocks: shapes, attention, positions, and which layers are mixtures."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from moetrain.config.attention import MultiLatentAttentionConfig, latent_attention_problems
from moetrain.config.da_moe import CAUSAL_IMPORTANCE, NONCAUSAL_IMPORTANCE
from moetrain.config.moe import MoEConfig
from moetrain.config.section import PositiveFloat, PositiveInt, Section

Activation = Literal["swiglu", "relu"]
"""Of MLPs and experts; see `ModelConfig.activation`."""


class HeadConfig(Section):
    """A few numbers for a whole sequence, from a linear layer on its pooled final hidden states."""

    outputs: PositiveInt = Field(description="numbers per sequence: classes, or 1 for a score")
    pooling: Literal["mean", "first", "last"] = Field(
        default="mean", description="of the hidden states of real tokens: their mean, or that of the first or last one"
    )


class ModelConfig(Section):
    """A transformer: RMSNorm, rotary or relative positions, grouped-query or latent attention, SwiGLU or ReLU."""

    type: Literal["decoder", "encoder"] = Field(
        default="decoder", description="decoder: a token sees those before it; encoder: all tokens see each other"
    )
    head: HeadConfig | None = Field(
        default=None, description="of a sequence task, in the place of the output layer; absent: a language model"
    )
    num_layers: PositiveInt = Field(description="transformer layers")
    hidden_size: PositiveInt = Field(description="width of the residual stream")
    num_attention_heads: PositiveInt = Field(description="query heads")
    num_query_groups: PositiveInt | None = Field(
        default=None, description="key/value heads; default: num_attention_heads"
    )
    kv_channels: PositiveInt | None = Field(
        default=None, description="width of an attention head; default: hidden_size / num_attention_heads"
    )
    add_qkv_bias: bool = Field(default=False, description="biases on queries, keys and values (Qwen2)")
    qk_layernorm: Literal["head", "projection"] | None = Field(
        default=None,
        description="RMSNorm of queries and keys before the rotary positions: of each head with one weight for all "
        "(Qwen3), or of all heads together (OLMoE); absent: none",
    )
    multi_latent_attention: MultiLatentAttentionConfig | None = Field(
        default=None, description="keys and values from latents (DeepSeek-V2 and V3); absent: ordinary attention"
    )
    ffn_hidden_size: PositiveInt = Field(description="hidden units of a dense layer's MLP")
    activation: Activation = Field(
        default="swiglu",
        description="of MLPs and experts: silu(gate) * up, or max(0, x) of one projection (T5, Switch Transformers)",
    )
    vocab_size: PositiveInt = Field(description="rows of the embedding; at least the tokenizer's size")
    seq_length: PositiveInt = Field(description="tokens of a training sequence")
    share_embeddings_and_output_weights: bool = Field(
        default=False, description="one table for the embedding and the output layer"
    )
    layernorm_epsilon: PositiveFloat = Field(default=1e-5, description="added to the mean square in RMSNorm")
    position_embedding: Literal["rope", "relative"] = Field(
        default="rope",
        description="rope: rotated queries and keys; relative: a learned number for each head and distance, the same "
        "in every layer, on the attention's scores (T5, arXiv 1910.10683)",
    )
    relative_buckets: PositiveInt = Field(
        default=32,
        description="rows of the table of relative positions; an encoder has half of them for each direction",
    )
    relative_max_distance: PositiveInt = Field(
        default=128, description="from here on all distances share a row of the table of relative positions"
    )
    rotary_base: PositiveFloat = Field(default=10000.0, description="base period of the rotary positions")
    init_method_std: PositiveFloat = Field(
        default=0.02, description="standard deviation of initial weights; 1/sqrt(2 num_layers) of it into the residual"
    )
    recompute: Literal["none", "full"] = Field(
        default="none", description="activations: keep all, or only layer inputs"
    )
    moe: MoEConfig | None = Field(default=None, description="mixture-of-experts layers; absent: a dense model")

    @property
    def kv_heads(self) -> int:
        """Key/value heads, with the default resolved."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Width of one attention head; with latents, of its query and key."""
        if self.multi_latent_attention is not None:
            return self.multi_latent_attention.qk_width
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def value_dim(self) -> int:
        """Width of one head's value."""
        return self.head_dim if self.multi_latent_attention is None else self.multi_latent_attention.v_head_dim

    def is_moe_layer(self, layer: int) -> bool:
        """Whether the layer with this 0-based global number has experts."""
        if self.moe is None:
            return False
        freq = self.moe.layer_freq
        return bool(freq[layer]) if isinstance(freq, list) else (layer + 1) % freq == 0

    @property
    def router_numbers(self) -> list[int]:
        """A number for each router, under which its counts are reported: that of its layer, and where a layer has two,
        twice as much and one more."""
        layers = [i for i in range(self.num_layers) if self.is_moe_layer(i)]
        if self.moe is None or self.moe.cartesian is None:
            return layers
        return [number for i in layers for number in (2 * i, 2 * i + 1)]

    @model_validator(mode="after")
    def _shapes_divide(self) -> ModelConfig:
        if problems := list(latent_attention_problems(self)):
            raise ValueError("\n".join(problems))
        own_widths = self.kv_channels is not None or self.multi_latent_attention is not None
        if not own_widths and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be divisible by num_attention_heads "
                f"({self.num_attention_heads}); or set kv_channels"
            )
        if self.head_dim % 2 and self.position_embedding == "rope" and self.multi_latent_attention is None:
            name = "hidden_size / num_attention_heads" if self.kv_channels is None else "kv_channels"
            raise ValueError(f"{name} ({self.head_dim}) must be even for rotary positions")
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be divisible by num_query_groups "
                f"({self.kv_heads})"
            )
        if self.moe is not None:
            freq = self.moe.layer_freq
            if isinstance(freq, list) and len(freq) != self.num_layers:
                raise ValueError(f"moe.layer_freq has {len(freq)} entries; num_layers is {self.num_layers}")
            if not any(self.is_moe_layer(i) for i in range(self.num_layers)):
                raise ValueError(f"moe.layer_freq ({freq}) makes none of the {self.num_layers} layers a MoE layer")
            self._check_hypernetwork_stages()
            measure = self.moe.router.attention_measure
            if measure in NONCAUSAL_IMPORTANCE and self.type == "decoder" and not self.moe.router.allows_noncausal:
                raise ValueError(
                    f"moe.router.importance ({measure}) looks at later tokens, so in a causal model the "
                    f"routing of a token would leak its future; legal here: {', '.join(CAUSAL_IMPORTANCE)}"
                )
            if self.moe.router.attention_teacher is not None and self.type == "encoder":
                raise ValueError(
                    "moe.router.importance (predicted) stands in for the attention that a token will receive, which an "
                    "encoder knows; legal here: col_max, col_sum and the measures of rows"
                )
        return self

    @model_validator(mode="after")
    def _positions_and_activation_can_be_computed(self) -> ModelConfig:
        for name in ("relative_buckets", "relative_max_distance", "rotary_base"):
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default and name.startswith("relative_") != (self.position_embedding == "relative"):
                raise ValueError(f"{name} ({value}) means nothing with position_embedding {self.position_embedding}")
        if self.position_embedding == "relative":
            # Of a direction's rows half are single distances, and those beyond must lead up to the last one.
            rows = self.relative_buckets // (2 if self.type == "encoder" else 1)
            if rows < 2 or (self.type == "encoder" and self.relative_buckets % 2):
                legal = "an even number from 4 on" if self.type == "encoder" else "2 or more"
                raise ValueError(f"relative_buckets ({self.relative_buckets}) must be {legal} (type {self.type})")
            if self.relative_max_distance <= rows // 2:
                raise ValueError(
                    f"relative_max_distance ({self.relative_max_distance}) must exceed the {rows // 2} distances that "
                    f"have a row of their own (relative_buckets: {self.relative_buckets})"
                )
        moe = self.moe
        if moe is not None and self.activation == "relu" and moe.dispatch.max_rows is not None:
            raise ValueError(
                f"moe.dispatch.max_rows ({moe.dispatch.max_rows}) works in rounds of the fused expert operator, which "
                "is SwiGLU's; activation relu has none; remove one of the two"
            )
        by_probability = moe is not None and moe.capacity is not None and moe.capacity.order == "probability"
        if by_probability and self.type == "decoder":
            raise ValueError(
                "moe.capacity.order (probability) lets a later token take an earlier one's place, so in a causal "
                "model the future would change the past; legal here: position"
            )
        return self

    def _check_hypernetwork_stages(self) -> None:
        stages = self.moe.hyper.stages if self.moe is not None and self.moe.hyper is not None else None
        if stages is None:
            return
        if self.num_layers % stages:
            raise ValueError(f"moe.hyper.stages ({stages}) must divide num_layers ({self.num_layers})")
        size = self.num_layers // stages
        for first in range(0, self.num_layers, size):
            if not any(self.is_moe_layer(i) for i in range(first, first + size)):
                raise ValueError(
                    f"moe.hyper.stages ({stages}) leaves layers {first} to {first + size - 1} with a hypernetwork and "
                    "no MoE layer to use it (moe.layer_freq)"
                )

    @model_validator(mode="after")
    def _head_sees_the_sequence(self) -> ModelConfig:
        if self.type == "decoder" and self.head is not None and self.head.pooling == "first":
            raise ValueError(
                "head.pooling (first) in a decoder: the first token sees nothing but itself; legal here: last, mean"
            )
        return self
