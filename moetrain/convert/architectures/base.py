"""What describes an architecture: its table of names, and how its config.json and our model settings correspond.

Reading a config refuses every value that we do not compute. Writing one is checked by reading it back: where that gives
another model than ours, the architecture does not fit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from pydantic import ValidationError

from moetrain.checkpoint.compatibility import model_differences
from moetrain.config.model import ModelConfig
from moetrain.convert.block_scales import has_block_scales
from moetrain.convert.mapping import Rule
from moetrain.errors import ConversionError

Config = Mapping[str, Any]
"""A config.json."""

REQUIRED: Any = object()
MAX_LAYERS = MAX_EXPERTS = 4096
_LIMITS = {"num_layers": MAX_LAYERS, "moe.num_experts": MAX_EXPERTS}
_MAX_INT = 2**31 - 1
# What training alone uses, or what only says how to compute.
_NOT_THE_FUNCTION = ("aux_loss", "aux_loss_coeff", "z_loss_coeff", "dispatch")


@dataclass(frozen=True)
class Field:
    """A value that both sides have.

    Attributes:
        theirs: names that config.json may have for it; the first one is written.
        ours: its dotted path in `ModelConfig`.
        default: what `transformers` takes where it is absent.
        kind: its type, of both sides; nullable: whether null stands for a default of ours; least: of whole numbers.
        words: their values and ours, where they differ.
    """

    theirs: tuple[str, ...]
    ours: str
    default: Any = REQUIRED
    kind: type = int
    nullable: bool = False
    words: Mapping[Any, Any] | None = None
    least: int = 1


@dataclass(frozen=True)
class Fixed:
    """A field whose other values we do not compute. The first legal one is written."""

    theirs: str
    legal: tuple[Any, ...]
    default: Any = REQUIRED


@dataclass(frozen=True)
class Architecture:
    """An architecture that `transformers` computes.

    Attributes:
        name: `model_type` in config.json; class_names: the model classes. The first one is written.
        spellings: tables of names. The first one is written; all are read, because a file may hold fused experts.
        rope_theta: base of the rotary positions where config.json has none; None: it has no rotary positions, or a
            field of its own for them.
        yarn: the settings of ours, by dotted path, that its stretched positions (YaRN) become; None: they are refused.
        implies: settings of ours that the architecture always has, by dotted path.
        complete: adds to our settings (a tree) what no field can say, from their config.
        express: the same the other way, into their config.
        notes: what of their config has no counterpart here, in sentences; none of it acts in evaluation.
        ignored: patterns of tensors that say nothing, with `{i}` for a number.
        unused: prefixes, by config, of tensors that stay behind: we have no place for their part of the model.
        published_code: what `auto_map` may name: the code that the first models came with, before transformers had it.
            It is not run.
        tied: two names of one tensor, of which a file may hold both, where the embeddings are tied.
    """

    name: str
    class_names: tuple[str, ...]
    spellings: tuple[tuple[Rule, ...], ...]
    fields: tuple[Field | Fixed, ...]
    rope_theta: float | None
    implies: Mapping[str, Any]
    complete: Callable[[Config, dict[str, Any]], None] = lambda _config, _tree: None
    express: Callable[[ModelConfig, dict[str, Any]], None] = lambda _model, _config: None
    notes: Callable[[Config], tuple[str, ...]] = lambda _config: ()
    ignored: tuple[str, ...] = ("model.layers.{i}.self_attn.rotary_emb.inv_freq",)
    unused: Callable[[Config], tuple[str, ...]] = lambda _config: ()
    yarn: str | None = None
    published_code: tuple[str, ...] = ()
    tied: tuple[str, str] = ("model.embed_tokens.weight", "lm_head.weight")

    def read_config(self, config: Config) -> ModelConfig:
        """The model that a config.json describes. ConversionError for the first thing that we do not compute."""
        _refuse_foreign_code(config, self.class_names, self.published_code)
        tree: dict[str, Any] = {}
        put_fields(config, self.fields, tree)
        if self.rope_theta is not None:
            rope = _rope_of(config, ("default",) if self.yarn is None else ("default", "yarn"))
            tree["rotary_base"] = _rotary_base(config, rope, self.rope_theta)
            if self.yarn is not None and _rope_kind(rope) == "yarn":
                _put(tree, self.yarn, _yarn_settings(rope))
        for path, value in self.implies.items():
            _put(tree, path, value)
        self.complete(config, tree)
        width = tree.get("kv_channels")
        if width is not None and width * tree["num_attention_heads"] == tree["hidden_size"]:
            tree["kv_channels"] = None  # as where nobody sets it
        try:
            return ModelConfig.model_validate_json(json.dumps(tree), strict=True)
        except ValidationError as error:
            told = "; ".join(f"model.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise ConversionError(f"config.json describes no model that we can compute: {told}") from error

    def write_config(self, model: ModelConfig) -> dict[str, Any]:
        """The config.json of a model. ConversionError, with the settings, where the architecture does not fit it."""
        _refuse_other_blocks(model, self.name)
        config = self.written(model)
        if different := self._differences(model, config):
            raise ConversionError(f"{self.name} does not fit this model: {'; '.join(different)}")
        return config

    def written(self, model: ModelConfig) -> dict[str, Any]:
        """The config.json of a model, whether or not it fits."""
        config: dict[str, Any] = {"model_type": self.name, "architectures": [self.class_names[0]]}
        config |= words_of(model, self.fields, self.name)
        if self.rope_theta is not None:
            # Both transformers 4 and 5 read this spelling; 4 would not see `rope_parameters`, and take its default.
            config |= {"rope_theta": model.rotary_base, "rope_scaling": None}
        self.express(model, config)
        return config

    def _differences(self, model: ModelConfig, config: Config) -> list[str]:
        there = {"model": _function_of(self.read_config(config))}
        here = {"model": _function_of(model)}
        return [f"{path} is {now}, and {before} in {self.name}" for path, before, now in model_differences(there, here)]


def _function_of(model: ModelConfig) -> dict[str, Any]:
    """The settings that decide what a model computes, with defaults resolved."""
    tree = model.model_dump(mode="json")
    tree |= {"kv_channels": model.head_dim, "num_query_groups": model.kv_heads}
    if model.moe is None:
        return tree
    moe = tree["moe"]
    for name in _NOT_THE_FUNCTION:
        del moe[name]
    moe["layer_freq"] = [int(model.is_moe_layer(layer)) for layer in range(model.num_layers)]
    if all(moe["layer_freq"]):
        del tree["ffn_hidden_size"]  # of dense layers
    router = moe["router"]
    router.pop("allow_noncausal", None)  # a permission; a decoder that makes use of it differs in its importance
    if "groups" in router and router["top_groups"] in (None, router["groups"]):
        for name in ("groups", "top_groups", "group_score"):
            del router[name]
    return tree


# --- reading --------------------------------------------------------------------------------------------------------


def refuse(name: str, value: Any, legal: str) -> NoReturn:
    """ConversionError for a field of config.json."""
    raise ConversionError(f"config.json: {name} is {json.dumps(value)[:200]}, which we do not compute; legal: {legal}")


def put_fields(config: Config, fields: Iterable[Field | Fixed], tree: dict[str, Any]) -> None:
    """Read some fields into our settings. ConversionError for a value that we do not compute."""
    for field in fields:
        if isinstance(field, Fixed):
            _require_legal(config, field)
        else:
            _put(tree, field.ours, value_of(config, field))


def _refuse_foreign_code(config: Config, class_names: tuple[str, ...], published: tuple[str, ...]) -> None:
    auto_map = config.get("auto_map") or {}
    if not isinstance(auto_map, dict) or any(code not in published for code in auto_map.values()):
        raise ConversionError("config.json: auto_map names Python code of the folder's own; only stock models are read")
    has_block_scales(config)  # refuses other quantization
    classes = config.get("architectures") or list(class_names)
    if not isinstance(classes, list) or not any(name in classes for name in class_names):
        refuse("architectures", classes, ", ".join(class_names))


def _require_legal(config: Config, field: Fixed) -> None:
    value = config.get(field.theirs, field.default)
    if value is REQUIRED:
        raise ConversionError(f"config.json lacks {field.theirs}")
    if value not in field.legal:
        refuse(field.theirs, value, ", ".join(json.dumps(v) for v in field.legal))


def value_of(config: Config, field: Field) -> Any:
    """Ours for a value of config.json. ConversionError for one of another type, or out of all bounds."""
    there = [name for name in field.theirs if name in config]
    if not there and field.default is REQUIRED:
        raise ConversionError(f"config.json lacks {field.theirs[0]}")
    value = config[there[0]] if there else field.default
    for other in there[1:]:
        if config[other] != value:
            raise ConversionError(f"config.json: {there[0]} is {value!r} and {other} is {config[other]!r}")
    if field.words is not None:
        if not isinstance(value, str | bool) or value not in field.words:
            refuse(field.theirs[0], value, ", ".join(json.dumps(word) for word in field.words))
        return field.words[value]
    if value is None and field.nullable:
        return None
    if field.kind is float and type(value) is int:
        value = float(value) if abs(value) <= _MAX_INT else value
    if type(value) is not field.kind:
        refuse(field.theirs[0], value, f"a value of type {field.kind.__name__}")
    most = _LIMITS.get(field.ours, _MAX_INT)
    if type(value) is int and not field.least <= value <= most:
        refuse(field.theirs[0], value, f"{field.least} to {most}")
    return value


_YARN = (
    Field(("factor",), "factor", kind=float),
    Field(("original_max_position_embeddings",), "original_max_position_embeddings"),
    Field(("beta_fast",), "beta_fast", default=None, kind=float, nullable=True),
    Field(("beta_slow",), "beta_slow", default=None, kind=float, nullable=True),
    Field(("mscale",), "mscale", default=None, kind=float, nullable=True),
    Field(("mscale_all_dim",), "mscale_all_dim", default=None, kind=float, nullable=True),
)
_YARN_FIXED = (Fixed("attention_factor", (None,), default=None), Fixed("truncate", (True,), default=True))


def _rope_of(config: Config, kinds: tuple[str, ...]) -> Config:
    """transformers 5's `rope_parameters`, or 4's `rope_scaling`. ConversionError for another kind than these."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        refuse("rope_parameters", rope, "a mapping with rope_type default and rope_theta")
    if _rope_kind(rope) not in kinds or any(isinstance(value, dict) for value in rope.values()):
        name = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
        refuse(name, rope, f"none, or rope_type {', '.join(kinds)}")
    return rope


def _rope_kind(rope: Config) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _rotary_base(config: Config, rope: Config, default: float) -> float:
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        refuse("partial_rotary_factor", partial, "1")
    theta = rope.get("rope_theta", config.get("rope_theta", default))
    if type(theta) not in (int, float) or not 0 < theta < 1e12:
        refuse("rope_theta", theta, "a number above 0")
    return float(theta)


def _yarn_settings(rope: Config) -> dict[str, Any]:
    """Settings that are none, or 0, are those that transformers has a default for."""
    for field in _YARN_FIXED:
        _require_legal(rope, field)
    values = ((field.ours, value_of(rope, field)) for field in _YARN)
    return {name: value for name, value in values if value}


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[last] = value


# --- writing --------------------------------------------------------------------------------------------------------


def words_of(model: ModelConfig, fields: Iterable[Field | Fixed], architecture: str) -> dict[str, Any]:
    """Some fields of a model's config.json."""
    config: dict[str, Any] = {}
    for field in fields:
        if isinstance(field, Fixed):
            config[field.theirs] = field.legal[0]
        else:
            config[field.theirs[0]] = _their_word(_get(model, field.ours), field, architecture)
    return config


def _refuse_other_blocks(model: ModelConfig, architecture: str) -> None:
    """Before a config is made that has no word for these: heads may be odd where positions do not rotate."""
    for name in ("position_embedding", "activation"):
        value, plain = getattr(model, name), ModelConfig.model_fields[name].default
        if value != plain:
            raise ConversionError(f"{architecture} does not fit this model: model.{name} is {value}, not {plain}")


def _get(model: ModelConfig, path: str) -> Any:
    if path == "kv_channels":
        return model.head_dim
    if path == "num_query_groups":
        return model.kv_heads
    value: Any = model
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def _their_word(value: Any, field: Field, architecture: str) -> Any:
    if field.words is None:
        if value is None and field.default is REQUIRED:
            raise ConversionError(f"{architecture} does not fit this model, which has no model.{field.ours}")
        return value
    for theirs, ours in field.words.items():
        if ours == value:
            return theirs
    raise ConversionError(f"{architecture} does not fit this model: model.{field.ours} is {value!r}")
