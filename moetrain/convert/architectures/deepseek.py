"""DeepSeek-V2 (arXiv 2405.04434) and V3 (arXiv 2412.19437): latent attention, shared experts, groups of experts."""

from __future__ import annotations

from typing import Any

from moetrain.config.model import ModelConfig
from moetrain.convert.architectures.base import Architecture, Config, Field, Fixed, refuse
from moetrain.convert.architectures.decoder import (
    ATTENTION,
    COMMON,
    DENSE_MLP,
    EXPERTS,
    FUSED_EXPERTS,
    GATES,
    NO_ATTENTION_BIAS,
    ROUTER,
    THEIR_ATTENTION,
    TOP_K,
    fields_beside_attention,
)
from moetrain.convert.architectures.deepseek_experts import ROUTER_BIAS, SHARED_EXPERT, read_layers, write_layers
from moetrain.convert.mapping import Rule, same

_LATENT = "multi_latent_attention."
_MAX_MTP = 64

# Rows stand as ours do: per head the part that does not rotate, then the other one, or the value.
_ATTENTION: tuple[Rule, ...] = tuple(
    same(f"{ATTENTION}{ours}.weight", f"{THEIR_ATTENTION}{theirs}.weight")
    for ours, theirs in (
        ("linear_q_proj", "q_proj"),
        ("linear_q_down_proj", "q_a_proj"),
        ("q_layernorm", "q_a_layernorm"),
        ("linear_q_up_proj", "q_b_proj"),
        ("linear_kv_down_proj", "kv_a_proj_with_mqa"),
        ("kv_layernorm", "kv_a_layernorm"),
        ("linear_kv_up_proj", "kv_b_proj"),
    )
)
_FIELDS: tuple[Field | Fixed, ...] = (
    *fields_beside_attention(epsilon=1e-6),
    Field(("q_lora_rank",), _LATENT + "q_lora_rank", default=1536, nullable=True),
    Field(("kv_lora_rank",), _LATENT + "kv_lora_rank"),
    Field(("qk_nope_head_dim",), _LATENT + "qk_head_dim"),
    Field(("qk_rope_head_dim",), _LATENT + "qk_pos_emb_head_dim"),
    Field(("v_head_dim",), _LATENT + "v_head_dim"),
    Field(("intermediate_size",), "ffn_hidden_size"),
    Field(("moe_intermediate_size",), "moe.ffn_hidden_size"),
    TOP_K,
    NO_ATTENTION_BIAS,
    Fixed("moe_layer_freq", (1,), default=1),
)
# transformers' norms of the latents have its default, whatever rms_norm_eps is, as DeepSeek's own code has.
_IMPLIES = {_LATENT + "layernorm_epsilon": 1e-6}


def _published(version: str) -> tuple[str, ...]:
    return (
        f"configuration_deepseek.Deepseek{version}Config",
        f"modeling_deepseek.Deepseek{version}Model",
        f"modeling_deepseek.Deepseek{version}ForCausalLM",
    )


def _spellings(*rules: Rule) -> tuple[tuple[Rule, ...], ...]:
    return tuple(
        (*COMMON, *_ATTENTION, ROUTER, *rules, *SHARED_EXPERT, *experts, *DENSE_MLP)
        for experts in (EXPERTS, FUSED_EXPERTS)
    )


def _require_whole_heads(config: Config, tree: dict[str, Any]) -> None:
    """Names for widths that follow from others here must not contradict them."""
    latent, heads = tree["multi_latent_attention"], tree["num_attention_heads"]
    rotated = latent["qk_pos_emb_head_dim"]
    for name, width in (
        ("num_key_value_heads", heads),
        ("head_dim", rotated),
        ("qk_head_dim", latent["qk_head_dim"] + rotated),
    ):
        value = config.get(name)
        if value is not None and (type(value) is not int or value != width):
            refuse(name, value, f"{width}")


def _write_common(model: ModelConfig, config: dict[str, Any]) -> None:
    write_layers(model, config)
    config["num_key_value_heads"] = model.num_attention_heads
    latent = model.multi_latent_attention
    if latent is not None and latent.yarn is not None:
        # Both names of the kind: transformers has the second, DeepSeek's own code the first.
        config["rope_scaling"] = {"type": "yarn", "rope_type": "yarn"} | latent.yarn.model_dump(exclude_none=True)


# --- V3 -------------------------------------------------------------------------------------------------------------


def _complete_v3(config: Config, tree: dict[str, Any]) -> None:
    _require_whole_heads(config, tree)
    read_layers(config, tree, dense=3, shared=1)


def _express_v3(model: ModelConfig, config: dict[str, Any]) -> None:
    _write_common(model, config)
    config["topk_group"] = config["topk_group"] or config["n_group"]
    config["num_nextn_predict_layers"] = 0


def _multi_token_prediction(config: Config) -> tuple[str, ...]:
    """Layers behind the last one, which predict tokens further on: for training, or to guess ahead in generation."""
    layers = config["num_hidden_layers"]
    number = config.get("num_nextn_predict_layers", config.get("num_mtp_layers", 1))
    if type(number) is not int or not 0 <= number <= _MAX_MTP:
        refuse("num_nextn_predict_layers", number, f"0 to {_MAX_MTP}")
    return tuple(f"model.layers.{i}." for i in range(layers, layers + number))


DEEPSEEK_V3 = Architecture(
    name="deepseek_v3",
    class_names=("DeepseekV3ForCausalLM",),
    spellings=_spellings(ROUTER_BIAS),
    fields=(
        *_FIELDS,
        Field(("n_routed_experts", "num_local_experts"), "moe.num_experts"),
        Field(("rope_interleave",), _LATENT + "rotary_interleaved", default=True, kind=bool),
        Field(("norm_topk_prob",), "moe.router.gates", default=True, words=GATES.words),
        Field(("routed_scaling_factor",), "moe.router.scaling_factor", default=2.5, kind=float),
        Field(("n_group",), "moe.router.groups", default=8),
        Field(("topk_group",), "moe.router.top_groups", default=4),
        Fixed("scoring_func", ("sigmoid",), default="sigmoid"),
        Fixed("topk_method", ("noaux_tc",), default="noaux_tc"),
    ),
    rope_theta=10_000.0,
    yarn=_LATENT + "yarn",
    implies=_IMPLIES | {"moe.router.type": "expert_bias", "moe.router.scores": "sigmoid"},
    published_code=_published("V3"),
    complete=_complete_v3,
    express=_express_v3,
    unused=_multi_token_prediction,
)


# --- V2 -------------------------------------------------------------------------------------------------------------


def _complete_v2(config: Config, tree: dict[str, Any]) -> None:
    """Its groups count in one of its ways to choose only; a group is worth its best expert."""
    _require_whole_heads(config, tree)
    read_layers(config, tree, shared=2)
    router, method = tree["moe"]["router"], config.get("topk_method", "greedy")
    if method == "greedy":
        del router["groups"], router["top_groups"]
    elif method != "group_limited_greedy":
        refuse("topk_method", method, '"greedy", "group_limited_greedy"')
    elif router["groups"] is None or router["top_groups"] is None:
        refuse("n_group", router["groups"], "with topk_method group_limited_greedy, a number, as topk_group")


def _express_v2(model: ModelConfig, config: dict[str, Any]) -> None:
    _write_common(model, config)
    config["topk_group"] = config["topk_group"] or config["n_group"]
    config["topk_method"] = "greedy" if config["topk_group"] == config["n_group"] else "group_limited_greedy"


DEEPSEEK_V2 = Architecture(
    name="deepseek_v2",
    class_names=("DeepseekV2ForCausalLM",),
    spellings=_spellings(),
    fields=(
        *_FIELDS,
        Field(("n_routed_experts", "num_experts"), "moe.num_experts"),
        Field(("routed_scaling_factor",), "moe.router.scaling_factor", default=1.0, kind=float),
        Field(("n_group",), "moe.router.groups", default=None, nullable=True),
        Field(("topk_group",), "moe.router.top_groups", default=None, nullable=True),
        Field(("aux_loss_alpha",), "moe.aux_loss_coeff", default=0.001, kind=float),
        Fixed("norm_topk_prob", (False,), default=False),
        Fixed("scoring_func", ("softmax",), default="softmax"),
        Fixed("mlp_bias", (False,), default=False),
    ),
    rope_theta=10_000.0,
    yarn=_LATENT + "yarn",
    implies=_IMPLIES
    | {
        _LATENT + "rotary_interleaved": True,
        "moe.router.type": "top_k",
        "moe.router.gates": "raw",
        "moe.router.group_score": "max",
    },
    published_code=_published("V2"),
    complete=_complete_v2,
    express=_express_v2,
)
