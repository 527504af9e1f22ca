"""Our `ModelConfig` as the configuration that the exported modelling files read."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from moetrain.config.da_moe import DAMoERouterConfig
from moetrain.config.model import ModelConfig as OurConfig
from moetrain.config.relatives import relatives_used
from moetrain.config.schema import RunConfig
from moetrain.convert.architectures.moetrain import MOETRAIN
from moetrain.convert.hf_modeling.configuration_moetrain import IMPORTANCE, MoetrainConfig
from moetrain.errors import ConversionError


def refuse_inexpressible(model: OurConfig) -> None:
    """ConversionError for a model that the exported files cannot compute."""
    if used := [path for path in relatives_used(model) if path != "model.moe.shared_expert_ffn_hidden_size"]:
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
    router = model.moe.router if model.moe is not None else None
    if isinstance(router, DAMoERouterConfig) and router.importance not in IMPORTANCE:
        raise ConversionError(
            f"model.moe.router.importance ({router.importance}): the exported modelling code has no such measure; "
            f"it has: {', '.join(IMPORTANCE)}"
        )


def own_config(model: OurConfig) -> dict[str, Any]:
    """The config.json of an export with our modelling files, without tokenizer ids and dtype. ConversionError for a
    model that those cannot compute."""
    refuse_inexpressible(model)
    return MOETRAIN.write_config(model)


def hf_config(model: OurConfig) -> MoetrainConfig:
    """The same as transformers sees it."""
    return MoetrainConfig(**own_config(model))


def run_config(config: dict) -> RunConfig:
    """The run's settings as a checkpoint carries them. ConversionError when this version cannot read them."""
    try:
        return RunConfig.model_validate(config)
    except ValidationError as error:
        raise ConversionError(f"the checkpoint's config is not one that this version understands: {error}") from error
