"""What all stock decoders of the Llama family share: names of tensors, and fields of config.json."""

from __future__ import annotations

from typing import Any

from moetrain.convert.architectures.base import Config, Field, Fixed, refuse
from moetrain.convert.mapping import Rule, same

ATTENTION, THEIR_ATTENTION = "decoder.layers.{i}.self_attention.", "model.layers.{i}.self_attn."
MLP, THEIR_MLP = "decoder.layers.{i}.mlp.", "model.layers.{i}.mlp."

COMMON: tuple[Rule, ...] = (
    same("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    same("decoder.layers.{i}.input_layernorm.weight", "model.layers.{i}.input_layernorm.weight"),
    Rule(
        ATTENTION + "linear_qkv.weight",
        tuple(THEIR_ATTENTION + f"{x}_proj.weight" for x in "qkv"),
        "split_qkv",
    ),
    same(ATTENTION + "linear_proj.weight", THEIR_ATTENTION + "o_proj.weight"),
    same("decoder.layers.{i}.pre_mlp_layernorm.weight", "model.layers.{i}.post_attention_layernorm.weight"),
    same("decoder.final_layernorm.weight", "model.norm.weight"),
    same("output_layer.weight", "lm_head.weight"),
)

QKV_BIAS = Rule(ATTENTION + "linear_qkv.bias", tuple(THEIR_ATTENTION + f"{x}_proj.bias" for x in "qkv"), "split_qkv")

QK_NORM: tuple[Rule, ...] = (
    same(ATTENTION + "q_layernorm.weight", THEIR_ATTENTION + "q_norm.weight"),
    same(ATTENTION + "k_layernorm.weight", THEIR_ATTENTION + "k_norm.weight"),
)

DENSE_MLP: tuple[Rule, ...] = (
    Rule(
        MLP + "linear_fc1.weight",
        (THEIR_MLP + "gate_proj.weight", THEIR_MLP + "up_proj.weight"),
        "split_gate_up",
    ),
    same(MLP + "linear_fc2.weight", THEIR_MLP + "down_proj.weight"),
)

ROUTER = same(MLP + "router.weight", THEIR_MLP + "gate.weight")

EXPERTS: tuple[Rule, ...] = (
    Rule(
        MLP + "experts.fc1",
        (THEIR_MLP + "experts.{e}.gate_proj.weight", THEIR_MLP + "experts.{e}.up_proj.weight"),
        "split_gate_up",
    ),
    same(MLP + "experts.fc2", THEIR_MLP + "experts.{e}.down_proj.weight"),
)
"""One tensor per expert and projection, as transformers 4 names them and 5 writes them."""

FUSED_EXPERTS: tuple[Rule, ...] = (
    Rule(MLP + "experts.fc1", (THEIR_MLP + "experts.gate_up_proj",), stacked=True),
    Rule(MLP + "experts.fc2", (THEIR_MLP + "experts.down_proj",), stacked=True),
)
"""As transformers 5 holds them in memory, and writes them with `save_original_format=False`."""


def decoder_fields(epsilon: float, kv_heads: Any = ..., head_dim: Any = None) -> tuple[Field | Fixed, ...]:
    """The fields of every decoder. Arguments: what `transformers` takes where config.json has none; `...`: nothing."""
    grouped = {} if kv_heads is ... else {"default": kv_heads}
    return (
        *fields_beside_attention(epsilon),
        Field(("num_key_value_heads",), "num_query_groups", nullable=True, **grouped),
        Field(("head_dim",), "kv_channels", default=head_dim, nullable=True),
    )


def fields_beside_attention(epsilon: float) -> tuple[Field | Fixed, ...]:
    """Of decoders whose attention may be of any kind, too."""
    return (
        Field(("vocab_size",), "vocab_size"),
        Field(("hidden_size",), "hidden_size"),
        Field(("num_hidden_layers",), "num_layers"),
        Field(("num_attention_heads",), "num_attention_heads"),
        Field(("max_position_embeddings",), "seq_length"),
        Field(("rms_norm_eps",), "layernorm_epsilon", default=epsilon, kind=float),
        Field(("initializer_range",), "init_method_std", default=0.02, kind=float),
        Field(("tie_word_embeddings",), "share_embeddings_and_output_weights", default=False, kind=bool),
        Fixed("hidden_act", ("silu", "swish"), default="silu"),
        Fixed("attention_dropout", (0.0, None), default=0.0),
    )


NO_ATTENTION_BIAS = Fixed("attention_bias", (False,), default=False)
"""Where it is true, the output projection has one too."""

NO_SLIDING_WINDOW = Fixed("use_sliding_window", (False,), default=False)


def refuse_sliding_layers(config: Config, _: dict[str, Any]) -> None:
    """Of models whose layers each have a type."""
    types = config.get("layer_types")
    if types is not None and (not isinstance(types, list) or any(kind != "full_attention" for kind in types)):
        refuse("layer_types", types, "full_attention in every layer")


def all_layers(_: Config, tree: dict[str, Any]) -> None:
    """Experts in every layer, so that no layer's MLP has a width of its own."""
    tree["ffn_hidden_size"] = tree["moe"]["ffn_hidden_size"]


GATES = Field(("norm_topk_prob",), "moe.router.gates", default=False, words={True: "renormalized", False: "raw"})
TOP_K = Field(("num_experts_per_tok",), "moe.router.top_k")
AUX_LOSS = Field(("router_aux_loss_coef",), "moe.aux_loss_coeff", default=0.001, kind=float)
SOFTMAX_TOP_K = {"moe.router.type": "top_k"}
