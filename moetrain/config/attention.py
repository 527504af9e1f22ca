"""Settings of attention that is not Megatron's ordinary one, and what they exclude."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator

from moetrain.config.section import PositiveFloat, PositiveInt, Section

if TYPE_CHECKING:
    from moetrain.config.model import ModelConfig


# Wide beyond any use, and narrow enough for logarithms.
_Sane = Annotated[float, Field(ge=1e-6, le=1e6)]


class YarnConfig(Section):
    """Rotary positions stretched to more tokens than a model was first trained on (YaRN, arXiv 2309.00071): fast
    rotations stay, slow ones are slowed by `factor`, and attention is sharpened as DeepSeek-V2 does it."""

    factor: float = Field(ge=1.0, le=1e6, description="how many times longer")
    original_max_position_embeddings: PositiveInt = Field(description="tokens before stretching")
    beta_fast: _Sane = Field(default=32.0, description="rotations over those tokens from which a pair is fast")
    beta_slow: _Sane = Field(default=1.0, description="rotations over those tokens up to which a pair is slow")
    mscale: _Sane | None = Field(
        default=None,
        description="weight of ln(factor) in what multiplies the rotated dimensions; needs mscale_all_dim to count",
    )
    mscale_all_dim: _Sane | None = Field(
        default=None, description="weight of ln(factor) in what multiplies all scores (DeepSeek-V3: 1); absent: nothing"
    )

    @model_validator(mode="after")
    def _fast_is_faster(self) -> YarnConfig:
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast ({self.beta_fast:g}) must exceed beta_slow ({self.beta_slow:g})")
        return self

    @property
    def rotated_factor(self) -> float:
        """Of the cosines and sines."""
        if self.mscale is not None and self.mscale_all_dim is not None:
            return self._sharpened(self.mscale) / self._sharpened(self.mscale_all_dim)
        return self._sharpened(1.0)

    @property
    def score_factor(self) -> float:
        """Of the scores, beside 1 / sqrt(width)."""
        return 1.0 if self.mscale_all_dim is None else self._sharpened(self.mscale_all_dim) ** 2

    def _sharpened(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1.0


class MultiLatentAttentionConfig(Section):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434 section 2.1): keys and values of all heads are made of
    a small latent per token, and positions rotate a part of their own, whose key all heads share."""

    q_lora_rank: PositiveInt | None = Field(
        default=None, description="width of a token's latent for its queries; absent: queries come from the token"
    )
    kv_lora_rank: PositiveInt = Field(description="width of a token's latent for its keys and values")
    qk_head_dim: PositiveInt = Field(description="width of a head's query and key that does not rotate")
    qk_pos_emb_head_dim: PositiveInt = Field(description="width that rotates, beside it; an even number")
    v_head_dim: PositiveInt = Field(description="width of a head's value")
    rotary_interleaved: bool = Field(
        default=True,
        description="which dimensions rotate together: neighbors (DeepSeek), or each with the one half the width away",
    )
    layernorm_epsilon: PositiveFloat = Field(
        default=1e-6, description="of the latents' norms (DeepSeek's code has 1e-6 whatever the model's is)"
    )
    yarn: YarnConfig | None = Field(default=None, description="stretched positions; absent: none")

    @model_validator(mode="after")
    def _pairs_rotate(self) -> MultiLatentAttentionConfig:
        if self.qk_pos_emb_head_dim % 2:
            raise ValueError(f"qk_pos_emb_head_dim ({self.qk_pos_emb_head_dim}) must be even for rotary positions")
        return self

    @property
    def qk_width(self) -> int:
        """Of a head's whole query and key."""
        return self.qk_head_dim + self.qk_pos_emb_head_dim


def latent_attention_problems(model: ModelConfig) -> Iterator[str]:
    """What means nothing beside `multi_latent_attention`, or cannot be computed with it."""
    latent = model.multi_latent_attention
    if latent is None:
        return
    reasons = {
        "kv_channels": "the widths are qk_head_dim, qk_pos_emb_head_dim and v_head_dim",
        "add_qkv_bias": "its projections have none",
        "qk_layernorm": "it has norms of its own, of the latents",
        "position_embedding": "its positions rotate",
    }
    for name, reason in reasons.items():
        value, default = getattr(model, name), type(model).model_fields[name].default
        if value != default:
            yield f"{name} ({value}) cannot stand beside multi_latent_attention: {reason}"
    if model.kv_heads != model.num_attention_heads:
        yield (
            f"num_query_groups ({model.num_query_groups}) cannot stand beside multi_latent_attention: every head has "
            f"keys and values of its own; legal: absent, or num_attention_heads ({model.num_attention_heads})"
        )
    if latent.yarn is not None and model.rotary_base <= 1.0:
        yield f"rotary_base ({model.rotary_base:g}) must exceed 1 with multi_latent_attention.yarn"
