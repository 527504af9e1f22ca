"""Our own architecture: the modelling files of `hf_modeling`, which an export carries with it.

Its config.json has two groups of fields, `hyper` and `pretraining`; here their fields are called `hyper.bottleneck` and
the like. `pretraining` holds what only training reads, so that a folder that was exported comes back as it was.
"""

from __future__ import annotations

from typing import Any

from moetrain.config.da_moe import DAMoERouterConfig
from moetrain.config.model import ModelConfig
from moetrain.convert.architectures.base import Architecture, Config, Field, Fixed, put_fields, refuse, words_of
from moetrain.convert.architectures.decoder import (
    COMMON,
    DENSE_MLP,
    EXPERTS,
    MLP,
    QK_NORM,
    QKV_BIAS,
    ROUTER,
    THEIR_MLP,
)
from moetrain.convert.architectures.deepseek_experts import SHARED_EXPERT
from moetrain.convert.hf_modeling import configuration_moetrain as legal
from moetrain.convert.mapping import Rule, same
from moetrain.errors import ConversionError

_HYPERNETWORK = (
    "layer_embedding",
    *(f"{part}.{kind}" for part in ("input", "down", "down_bias", "up", "up_bias") for kind in ("weight", "bias")),
)
_SELECTION = (
    "expert_embedding",
    *(f"{part}.{kind}" for part in ("process_in", "process_out") for kind in ("weight", "bias")),
    "constant",
)


def _all(names: tuple[str, ...], ours: str, theirs: str) -> tuple[Rule, ...]:
    """Tensors that only have another prefix."""
    return tuple(same(ours + name, theirs + name) for name in names)


RULES: tuple[Rule, ...] = (
    *COMMON,
    QKV_BIAS,
    *QK_NORM,
    *DENSE_MLP,
    ROUTER,
    # A rounded bias would choose other experts, too.
    same(MLP + "router.bias", THEIR_MLP + "gate.bias", keep_fp32=True),
    *SHARED_EXPERT,
    same(MLP + "router.predictor", THEIR_MLP + "gate.predictor"),
    # Rounding thresholds to bf16 would change the number of experts of many tokens, so they never leave fp32.
    *(
        same(f"{MLP}router.{name}", f"{THEIR_MLP}gate.{name}", keep_fp32=True)
        for name in ("thresholds", "quartiles", "offsets", "visits", "threshold")
    ),
    *EXPERTS,
    *_all(_SELECTION, MLP + "hyper.", THEIR_MLP + "hyper.selection."),
    *_all(_HYPERNETWORK, MLP + "hyper.network.", THEIR_MLP + "hyper.network."),
    *_all(("down.weight", "down.bias", "up.weight", "up.bias"), MLP + "hyper.", THEIR_MLP + "hyper."),
    *_all(_HYPERNETWORK, "hypernetwork.", "model.hypernetwork."),
    *_all(_HYPERNETWORK, "hypernetworks.{s}.", "model.hypernetworks.{s}."),
    *_all(_SELECTION, "selection_embedding.", "model.selection_embedding."),
)


def _choice(theirs: str, ours: str, words: tuple[str, ...]) -> Field:
    """A field of one of a few words, the same on both sides."""
    return Field((theirs,), ours, kind=str, words={word: word for word in words})


AUTO_MAP = {
    "AutoConfig": "configuration_moetrain.MoetrainConfig",
    "AutoModel": "modeling_moetrain.MoetrainModel",
    "AutoModelForCausalLM": "modeling_moetrain.MoetrainForCausalLM",
}
_GROUPS = ("hyper", "pretraining")
_MOE: tuple[Field, ...] = (
    Field(("num_experts",), "moe.num_experts"),
    Field(("moe_intermediate_size",), "moe.ffn_hidden_size"),
    _choice("router_type", "moe.router.type", legal.ROUTERS),
    _choice("router_gates", "moe.router.gates", legal.GATES),
    Field(("shared_expert_intermediate_size",), "moe.shared_expert_ffn_hidden_size", default=None, nullable=True),
    Field(("pretraining.aux_loss",), "moe.aux_loss", kind=str),
    Field(("pretraining.aux_loss_coeff",), "moe.aux_loss_coeff", kind=float),
    Field(("pretraining.z_loss_coeff",), "moe.z_loss_coeff", kind=float),
)
_BEST_SCORES: tuple[Field, ...] = (
    Field(("num_experts_per_tok",), "moe.router.top_k"),
    _choice("router_scores", "moe.router.scores", legal.SCORES),
    Field(("router_scaling_factor",), "moe.router.scaling_factor", kind=float),
    Field(("expert_groups",), "moe.router.groups"),
    Field(("top_groups",), "moe.router.top_groups", default=None, nullable=True),
    _choice("group_score", "moe.router.group_score", legal.GROUP_SCORES),
)
_ROUTERS: dict[str, tuple[Field, ...]] = {
    "top_k": _BEST_SCORES,
    "expert_bias": (*_BEST_SCORES, Field(("pretraining.bias_rate",), "moe.router.bias_rate", kind=float)),
    "da_moe": (
        _choice("importance", "moe.router.importance", legal.IMPORTANCE),
        _choice("importance_direction", "moe.router.direction", legal.DIRECTIONS),
        _choice("budget", "moe.router.budget", legal.BUDGETS),
        Field(("min_k",), "moe.router.min_k"),
        Field(("pretraining.debias",), "moe.router.debias", kind=str),
        Field(("pretraining.mean_k",), "moe.router.mean_k", kind=float),
        Field(("pretraining.max_k",), "moe.router.max_k", default=None, nullable=True),
        Field(("pretraining.controller_rate",), "moe.router.controller_rate", kind=float),
        Field(("pretraining.teacher",), "moe.router.teacher", kind=str),
        Field(("pretraining.predictor_loss_coeff",), "moe.router.predictor_loss_coeff", kind=float),
    ),
}
_HYPER: tuple[Field, ...] = (
    *(
        Field((f"hyper.{name}",), f"moe.hyper.{name}")
        for name in ("bottleneck", "hidden", "expert_embedding", "process", "condition")
    ),
    Field(("hyper.layer_embedding",), "moe.hyper.layer_embedding", least=0),
    Field(("hyper.stages",), "moe.hyper.stages", default=None, nullable=True),
    *(_choice(f"hyper.{name}", f"moe.hyper.{name}", words) for name, words in legal.HYPER_CHOICES.items()),
)


def _complete(config: Config, tree: dict[str, Any]) -> None:
    layers = config.get("moe_layers")
    if not isinstance(layers, list) or any(type(i) is not int or i not in (0, 1) for i in layers):
        refuse("moe_layers", layers, "a list with a 0 or a 1 for each layer")
    if not any(layers):
        return
    put_fields(config, _MOE, tree)
    tree["moe"]["layer_freq"] = layers
    put_fields(config, _ROUTERS[tree["moe"]["router"]["type"]], tree)
    if any(name.startswith("hyper.") for name in config):
        put_fields(config, _HYPER, tree)


def _express(model: ModelConfig, config: dict[str, Any]) -> None:
    config["auto_map"] = AUTO_MAP
    config["moe_layers"] = [int(model.is_moe_layer(i)) for i in range(model.num_layers)]
    if model.moe is None:
        return
    router = model.moe.router
    if router.type not in _ROUTERS:
        raise ConversionError(
            f"model.moe.router.type ({router.type}): the exported modelling code has no such router; it has: "
            f"{', '.join(_ROUTERS)}"
        )
    config |= words_of(model, (*_MOE, *_ROUTERS[router.type]), "moetrain")
    if isinstance(router, DAMoERouterConfig):
        by_position = router.budget == "mean_k" and router.debias == "position"
        config |= {
            "position_buckets": router.position_buckets,
            "first_k": router.first_k(model.moe.num_experts) if by_position else None,
            "max_k": model.moe.max_top_k,
        }
    if model.moe.hyper is not None:
        config |= words_of(model, _HYPER, "moetrain")


class _Own(Architecture):
    """Reads and writes groups of fields as fields with a dot. A value that others decide must be what they make it, and
    `auto_map` is not followed, whatever it names."""

    def read_config(self, config: Config) -> ModelConfig:
        flat = _flat({name: value for name, value in config.items() if name != "auto_map"})
        model = super().read_config(flat)
        written = self.written(model)
        for name in ("position_buckets", "first_k", "max_k"):
            if name in written and (name not in flat or flat[name] != written[name]):
                refuse(name, flat.get(name), f"{written[name]}, which the other fields make it")
        for name in flat:
            if name.partition(".")[0] in _GROUPS and "." in name and name not in written:
                refuse(name, flat[name], "no such field here")
        return model

    def write_config(self, model: ModelConfig) -> dict[str, Any]:
        flat = super().write_config(model)
        nested = {name: value for name, value in flat.items() if "." not in name}
        for group in _GROUPS:
            fields = {
                name.removeprefix(f"{group}."): value for name, value in flat.items() if name.startswith(f"{group}.")
            }
            nested |= {group: fields} if fields else {}
        return nested


def _flat(config: Config) -> Config:
    flat = {name: value for name, value in config.items() if "." not in name or name.partition(".")[0] in _GROUPS}
    for group in _GROUPS:
        fields = flat.pop(group, None)
        if fields is not None and not isinstance(fields, dict):
            refuse(group, fields, "an object, or null")
        flat |= {f"{group}.{name}": value for name, value in (fields or {}).items()}
    return flat


MOETRAIN = _Own(
    name="moetrain",
    class_names=("MoetrainForCausalLM",),
    spellings=(RULES,),
    fields=(
        Fixed("format_version", (1,)),
        Field(("vocab_size",), "vocab_size"),
        Field(("hidden_size",), "hidden_size"),
        Field(("intermediate_size",), "ffn_hidden_size"),
        Field(("num_hidden_layers",), "num_layers"),
        Field(("num_attention_heads",), "num_attention_heads"),
        Field(("num_key_value_heads",), "num_query_groups", default=None, nullable=True),
        Field(("head_dim",), "kv_channels", default=None, nullable=True),
        Field(("qkv_bias",), "add_qkv_bias", default=False, kind=bool),
        Field(("qk_norm",), "qk_layernorm", default=None, kind=str, nullable=True),
        Field(("max_position_embeddings",), "seq_length"),
        Field(("rms_norm_eps",), "layernorm_epsilon", kind=float),
        Field(("rope_theta",), "rotary_base", kind=float),
        Field(("initializer_range",), "init_method_std", kind=float),
        Field(("tie_word_embeddings",), "share_embeddings_and_output_weights", default=False, kind=bool),
    ),
    rope_theta=None,
    implies={},
    complete=_complete,
    express=_express,
    ignored=(),
)
