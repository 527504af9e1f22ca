"""Our `ModelConfig` as the configuration that the exported modelling files read."""

from __future__ import annotations

from pydantic import ValidationError

from moetrain.config.relatives import relatives_used
from moetrain.config.routers import DAMoERouterConfig, TopKRouterConfig
from moetrain.config.schema import ModelConfig as OurConfig
from moetrain.config.schema import MoEConfig, RunConfig
from moetrain.convert.hf_modeling.configuration_moetrain import IMPORTANCE, MoetrainConfig
from moetrain.errors import ConversionError

HYPER_FIELDS = (
    "bottleneck",
    "hidden",
    "expert_embedding",
    "process",
    "condition",
    "layer_embedding",
    "condition_on",
    "aggregation",
    "sharing",
    "stages",
    "embeddings",
    "coefficient",
)
"""What of `HyperConfig` changes the function; `form` and `recompute` only choose how it is computed."""

AUTO_MAP = {
    "AutoConfig": "configuration_moetrain.MoetrainConfig",
    "AutoModel": "modeling_moetrain.MoetrainModel",
    "AutoModelForCausalLM": "modeling_moetrain.MoetrainForCausalLM",
}


def refuse_inexpressible(model: OurConfig) -> None:
    """ConversionError for a model that the exported files cannot compute."""
    if used := relatives_used(model):
        raise ConversionError(f"the exported modelling code has nothing for {', '.join(used)}; such a model stays here")
    if model.multi_latent_attention is not None:
        raise ConversionError(
            "model.multi_latent_attention: the exported modelling code has ordinary attention only; DeepSeek-V2's and "
            "V3's own models are exported as deepseek_v2 and deepseek_v3"
        )
    for name in ("position_embedding", "activation"):
        value, plain = getattr(model, name), OurConfig.model_fields[name].default
        if value != plain:
            raise ConversionError(f"model.{name} ({value}): the exported modelling code has {plain} only")
    if model.moe is not None and model.moe.hyper is not None and model.moe.hyper.condition_on == "random_fixed":
        raise ConversionError(
            "model.moe.hyper.condition_on is random_fixed: embeddings that are in no checkpoint cannot be exported; "
            "legal: unselected, selected, constant, static"
        )


def hf_config(model: OurConfig) -> MoetrainConfig:
    """The exported model's configuration, without tokenizer ids and dtype. ConversionError where there is none."""
    refuse_inexpressible(model)
    experts = _moe_settings(model.moe) if model.moe is not None else {}
    return MoetrainConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        qkv_bias=model.add_qkv_bias,
        qk_norm=model.qk_layernorm,
        max_position_embeddings=model.seq_length,
        rms_norm_eps=model.layernorm_epsilon,
        rope_theta=model.rotary_base,
        initializer_range=model.init_method_std,
        tie_word_embeddings=model.share_embeddings_and_output_weights,
        moe_layers=[int(model.is_moe_layer(layer)) for layer in range(model.num_layers)],
        architectures=["MoetrainForCausalLM"],
        auto_map=AUTO_MAP,
        **experts,
    )


def _moe_settings(moe: MoEConfig) -> dict:
    settings = {
        "num_experts": moe.num_experts,
        "moe_intermediate_size": moe.ffn_hidden_size,
        "router_type": moe.router.type,
        "hyper": moe.hyper.model_dump(include=set(HYPER_FIELDS)) if moe.hyper is not None else None,
    }
    match moe.router:
        case TopKRouterConfig() as router:
            _check_top_k(router)
            return settings | {"router_gates": router.gates, "num_experts_per_tok": router.top_k}
        case DAMoERouterConfig() as router:
            return settings | _importance_settings(router, moe)
        case router:
            raise ConversionError(
                f"model.moe.router.type ({router.type}): the exported modelling code has no such router; "
                "it has: top_k, da_moe"
            )


def _importance_settings(router: DAMoERouterConfig, moe: MoEConfig) -> dict:
    if router.importance not in IMPORTANCE:
        raise ConversionError(
            f"model.moe.router.importance ({router.importance}): the exported modelling code has no such measure; "
            f"it has: {', '.join(IMPORTANCE)}"
        )
    by_position = router.budget == "mean_k" and router.debias == "position"
    return {
        "router_gates": router.gates,
        "importance": router.importance,
        "importance_direction": router.direction,
        "budget": router.budget,
        "position_buckets": router.position_buckets,
        "first_k": router.first_k(moe.num_experts) if by_position else None,
        "min_k": router.min_k,
        "max_k": moe.max_top_k,
    }


def _check_top_k(router: TopKRouterConfig) -> None:
    """ConversionError for what the exported modelling code does not compute."""
    for name in ("scores", "scaling_factor", "groups"):
        value, plain = getattr(router, name), TopKRouterConfig.model_fields[name].default
        if value != plain:
            raise ConversionError(
                f"model.moe.router.{name} ({value}): the exported modelling code has top_k with {name} {plain} only"
            )


def run_config(config: dict) -> RunConfig:
    """The run's settings as a checkpoint carries them. ConversionError when this version cannot read them."""
    try:
        return RunConfig.model_validate(config)
    except ValidationError as error:
        raise ConversionError(f"the checkpoint's config is not one that this version understands: {error}") from error
