"""Switch Transformers (arXiv 2101.03961): their encoder. The decoder stays behind, because we have no encoder-decoders.

Read only. Switch, like T5, does not scale attention's scores, and we divide them by the root of the head's width, so
queries are multiplied by it: exactly, where it is a power of two, such as 8 for the published heads of 64.
"""

from __future__ import annotations

from typing import Any

from moetrain.convert.architectures.base import Architecture, Config, Field, Fixed, refuse, value_of
from moetrain.convert.mapping import Rule, same

_OURS, _SELF, _FF = "decoder.layers.{i}.", "encoder.block.{i}.layer.0.", "encoder.block.{i}.layer.1."
_FIRST = "encoder.block.0.layer.0.SelfAttention."
_RULES: tuple[Rule, ...] = (
    same("relative_positions.weight", _FIRST + "relative_attention_bias.weight"),
    same(_OURS + "input_layernorm.weight", _SELF + "layer_norm.weight"),
    Rule(
        _OURS + "self_attention.linear_qkv.weight",
        tuple(_SELF + f"SelfAttention.{x}.weight" for x in "qkv"),
        "split_unscaled_qkv",
    ),
    same(_OURS + "self_attention.linear_proj.weight", _SELF + "SelfAttention.o.weight"),
    same(_OURS + "pre_mlp_layernorm.weight", _FF + "layer_norm.weight"),
    same(_OURS + "mlp.linear_fc1.weight", _FF + "mlp.wi.weight"),
    same(_OURS + "mlp.linear_fc2.weight", _FF + "mlp.wo.weight"),
    same(_OURS + "mlp.router.weight", _FF + "mlp.router.classifier.weight"),
    same(_OURS + "mlp.experts.fc1", _FF + "mlp.experts.expert_{e}.wi.weight"),
    same(_OURS + "mlp.experts.fc2", _FF + "mlp.experts.expert_{e}.wo.weight"),
    same("decoder.final_layernorm.weight", "encoder.final_layer_norm.weight"),
)
_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")

# What acts in training only: its field, and what we have instead.
_LEFT_OUT = (
    (Field(("router_jitter_noise",), "", default=0.01, kind=float), "routers here have no noise in training"),
    (Field(("dropout_rate",), "", default=0.1, kind=float), "there is no dropout here"),
)


def _complete(config: Config, tree: dict[str, Any]) -> None:
    sparse = _sparse_layers(config, tree["num_layers"])
    if any(sparse):
        tree["moe"] |= {"layer_freq": sparse, "ffn_hidden_size": tree["ffn_hidden_size"]}
    else:
        del tree["moe"]


def _sparse_layers(config: Config, layers: int) -> list[int]:
    """Which layers transformers gives experts. It computes `encoder_sparse_step`, unless the file has one."""
    sparse = config.get("num_sparse_encoder_layers", 3)
    if type(sparse) is not int or sparse < 0:
        refuse("num_sparse_encoder_layers", sparse, "0 or more")
    step = config.get("encoder_sparse_step", layers // sparse if sparse else layers)
    if type(step) is not int:
        refuse("encoder_sparse_step", step, "a whole number")
    return [int(step > 0 and (step == 1 or i % step == 1)) for i in range(layers)]


def _notes(config: Config) -> tuple[str, ...]:
    values = ((field, value_of(config, field), instead) for field, instead in _LEFT_OUT)
    return tuple(f"{field.theirs[0]} ({value:g}) is left out: {instead}" for field, value, instead in values if value)


SWITCH = Architecture(
    name="switch_transformers",
    class_names=(
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersModel",
        "SwitchTransformersEncoderModel",
    ),
    spellings=tuple((same("embedding.word_embeddings.weight", name), *_RULES) for name in _EMBEDDINGS),
    fields=(
        Field(("vocab_size",), "vocab_size", default=32128),
        Field(("d_model",), "hidden_size", default=768),
        Field(("num_layers",), "num_layers", default=12),
        Field(("num_heads",), "num_attention_heads", default=12),
        Field(("d_kv",), "kv_channels", default=64),
        Field(("d_ff",), "ffn_hidden_size", default=2048),
        Field(("relative_attention_num_buckets",), "relative_buckets", default=32),
        Field(("relative_attention_max_distance",), "relative_max_distance", default=128),
        Field(("layer_norm_epsilon",), "layernorm_epsilon", default=1e-6, kind=float),
        Field(("num_experts",), "moe.num_experts", default=8),
        Field(("expert_capacity",), "moe.capacity.tokens", default=64),
        Field(("router_aux_loss_coef",), "moe.aux_loss_coeff", default=0.001, kind=float),
        Field(("router_z_loss_coef",), "moe.z_loss_coeff", default=0.001, kind=float),
        Fixed("dense_act_fn", ("relu",), default="relu"),
        Fixed("router_bias", (False,), default=False),
        Fixed("router_dtype", ("float32",), default="float32"),
    ),
    rope_theta=None,
    implies={
        "type": "encoder",
        "activation": "relu",
        "position_embedding": "relative",
        "seq_length": 512,  # relative positions set no limit; T5's length of texts
        "share_embeddings_and_output_weights": True,
        "moe.router.type": "top_k",
        "moe.router.top_k": 1,
    },
    complete=_complete,
    notes=_notes,
    ignored=(),
    unused=lambda _config: ("decoder.", "lm_head."),
    tied=_EMBEDDINGS,
)
