"""Our `ModelConfig` as the configuration that the exported modelling files read."""

from __future__ import annotations

from pydantic import ValidationError

from moetrain.config.relatives import relatives_used
from moetrain.config.routers import DAMoERouterConfig, TopKRouterConfig
from moetrain.config.schema import ModelConfig as OurConfig
from moetrain.config.schema import MoEConfig, RunConfig
from moetrain.convert.hf_modeling.configuration_moetrain import MoetrainConfig
from moetrain.errors import ConversionError

HYPER_FIELDS = ("bottleneck", "hidden", "expert_embedding", "process", "condition", "layer_embedding", "aggregation")
"""What of `HyperConfig` changes the function; `form` only chooses how it is computed."""

AUTO_MAP = {
    "AutoConfig": "configuration_moetrain.MoetrainConfig",
    "AutoModel": "modeling_moetrain.MoetrainModel",
    "AutoModelForCausalLM": "modeling_moetrain.MoetrainForCausalLM",
}


def hf_config(model: OurConfig) -> MoetrainConfig:
    """The exported model's configuration, without tokenizer ids and dtype."""
    if used := relatives_used(model):
        raise ConversionError(f"the exported modelling code has nothing for {', '.join(used)}; such a model stays here")
    experts = _moe_settings(model.moe) if model.moe is not None else {}
    return MoetrainConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.kv_heads,
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
            return settings | {"router_gates": router.gates, "num_experts_per_tok": router.top_k}
        case DAMoERouterConfig() as router:
            names = ("importance", "budget", "min_k")
            settings |= {"router_gates": router.gates}
            return settings | {name: getattr(router, name) for name in names} | {"max_k": moe.max_top_k}
        case router:
            raise ConversionError(
                f"model.moe.router.type ({router.type}): the exported modelling code has no such router; "
                "it has: top_k, da_moe"
            )


def run_config(config: dict) -> RunConfig:
    """The run's settings as a checkpoint carries them. ConversionError when this version cannot read them."""
    try:
        return RunConfig.model_validate(config)
    except ValidationError as error:
        raise ConversionError(f"the checkpoint's config is not one that this version understands: {error}") from error
