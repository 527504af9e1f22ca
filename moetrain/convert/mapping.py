"""How our tensors and Hugging Face's correspond. The correspondence is data (`RULES`); `ParamMap` reads it either way.

Our names and shapes are layout free: one tensor per parameter of the whole model, experts stacked in the first
dimension. Theirs are the names that `transformers` models of this family use on disk, one tensor per projection and
expert. `{i}` is a layer and `{s}` a group of layers that share a hypernetwork; `{e}` is an expert and, when only their
side has it, an index into our first dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from moetrain.config.routers import DAMoERouterConfig
from moetrain.config.schema import ModelConfig
from moetrain.config.size import parameter_shapes
from moetrain.errors import ConversionError

Shape = tuple[int, ...]


class WeightSource(Protocol):
    """Tensors by name, read piece by piece. A checkpoint reader is one; so is an exported folder."""

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> Shape: ...

    def read(self, name: str, offset: Shape, shape: Shape) -> Tensor:
        """The block of `name` that starts at `offset` and has `shape`."""
        ...


# --- transforms -----------------------------------------------------------------------------------------------------


def _split_gate_up(fc1: Tensor, _: ModelConfig) -> tuple[Tensor, ...]:
    """[2f, d] -> gate [f, d], up [f, d]."""
    return fc1.chunk(2)


def _join_gate_up(parts: tuple[Tensor, ...], _: ModelConfig) -> Tensor:
    return torch.cat(parts)


def _split_qkv(qkv: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    """[(H + 2G) hd, d] -> q [H hd, d], k [G hd, d], v [G hd, d].

    Megatron keeps each query group together: its H/G query heads, its key head, its value head.
    """
    groups, queries = model.kv_heads, model.num_attention_heads // model.kv_heads
    heads = qkv.reshape(groups, queries + 2, model.head_dim, -1)
    return tuple(part.flatten(0, 2) for part in heads.split((queries, 1, 1), dim=1))


def _join_qkv(parts: tuple[Tensor, ...], model: ModelConfig) -> Tensor:
    heads = [part.reshape(model.kv_heads, -1, model.head_dim, part.shape[-1]) for part in parts]
    return torch.cat(heads, dim=1).flatten(0, 2)


def _split_identity(tensor: Tensor, _: ModelConfig) -> tuple[Tensor, ...]:
    return (tensor,)


def _join_identity(parts: tuple[Tensor, ...], _: ModelConfig) -> Tensor:
    return parts[0]


@dataclass(frozen=True)
class Transform:
    """One of our tensors as several of theirs, and back."""

    split: Callable[[Tensor, ModelConfig], tuple[Tensor, ...]]
    join: Callable[[tuple[Tensor, ...], ModelConfig], Tensor]


TRANSFORMS = {
    "identity": Transform(_split_identity, _join_identity),
    "split_gate_up": Transform(_split_gate_up, _join_gate_up),
    "split_qkv": Transform(_split_qkv, _join_qkv),
}


# --- the table ------------------------------------------------------------------------------------------------------

Part = Literal["model", "head", "layer", "dense", "moe", "predictor", "budget", "hyper"]


@dataclass(frozen=True)
class Rule:
    """One line of the table. `part` says which models and layers have it, `shape` (in symbols of `_sizes`) its size.

    Lines of part `hyper` apply where the config says that the model has the tensor: what belongs to a layer in one
    variant belongs to several in another.
    """

    part: Part
    ours: str
    theirs: tuple[str, ...]
    shape: tuple[str, ...]
    transform: str = "identity"
    keep_fp32: bool = False


def _same(part: Part, ours: str, theirs: str, *shape: str, keep_fp32: bool = False) -> Rule:
    return Rule(part, ours, (theirs,), shape, keep_fp32=keep_fp32)


_ATTENTION, _THEIR_ATTENTION = "decoder.layers.{i}.self_attention.", "model.layers.{i}.self_attn."
_MLP, _THEIR_MLP = "decoder.layers.{i}.mlp.", "model.layers.{i}.mlp."
_EXPERT = _THEIR_MLP + "experts.{e}."


def _hypernetwork_rules(ours: str, theirs: str) -> tuple[Rule, ...]:
    """A hypernetwork, whoever shares it."""
    shapes = {
        "layer_embedding": ("rows", "m"),
        "input.weight": ("h", "c+m"),
        "input.bias": ("h",),
        "down.weight": ("r*d", "h"),
        "down.bias": ("r*d",),
        "down_bias.weight": ("r", "h"),
        "down_bias.bias": ("r",),
        "up.weight": ("r*d", "h"),
        "up.bias": ("r*d",),
        "up_bias.weight": ("d", "h"),
        "up_bias.bias": ("d",),
    }
    return tuple(_same("hyper", ours + name, theirs + name, *shape) for name, shape in shapes.items())


def _selection_rules(ours: str, theirs: str) -> tuple[Rule, ...]:
    """What makes a condition from a selection, whoever shares it."""
    shapes = {
        "expert_embedding": ("E", "t"),
        "process_in.weight": ("q_process", "t"),
        "process_in.bias": ("q_process",),
        "process_out.weight": ("c", "q_process"),
        "process_out.bias": ("c",),
        "constant": ("c",),
    }
    return tuple(_same("hyper", ours + name, theirs + name, *shape) for name, shape in shapes.items())


RULES: tuple[Rule, ...] = (
    _same("model", "embedding.word_embeddings.weight", "model.embed_tokens.weight", "V", "d"),
    _same("layer", "decoder.layers.{i}.input_layernorm.weight", "model.layers.{i}.input_layernorm.weight", "d"),
    Rule(
        "layer",
        _ATTENTION + "linear_qkv.weight",
        tuple(_THEIR_ATTENTION + f"{x}_proj.weight" for x in "qkv"),
        ("qkv", "d"),
        "split_qkv",
    ),
    _same("layer", _ATTENTION + "linear_proj.weight", _THEIR_ATTENTION + "o_proj.weight", "d", "q"),
    _same(
        "layer", "decoder.layers.{i}.pre_mlp_layernorm.weight", "model.layers.{i}.post_attention_layernorm.weight", "d"
    ),
    Rule(
        "dense",
        _MLP + "linear_fc1.weight",
        (_THEIR_MLP + "gate_proj.weight", _THEIR_MLP + "up_proj.weight"),
        ("2ffn", "d"),
        "split_gate_up",
    ),
    _same("dense", _MLP + "linear_fc2.weight", _THEIR_MLP + "down_proj.weight", "d", "ffn"),
    _same("moe", _MLP + "router.weight", _THEIR_MLP + "gate.weight", "E", "d"),
    _same("predictor", _MLP + "router.predictor", _THEIR_MLP + "gate.predictor", "d"),
    # Rounding thresholds to bf16 would change the number of experts of many tokens, so they never leave fp32.
    _same(
        "budget",
        _MLP + "router.thresholds",
        _THEIR_MLP + "gate.thresholds",
        "position_buckets",
        "thresholds",
        keep_fp32=True,
    ),
    Rule(
        "moe",
        _MLP + "experts.fc1",
        (_EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight"),
        ("E", "2f", "d"),
        "split_gate_up",
    ),
    _same("moe", _MLP + "experts.fc2", _EXPERT + "down_proj.weight", "E", "d", "f"),
    *_selection_rules(_MLP + "hyper.", _THEIR_MLP + "hyper.selection."),
    *_hypernetwork_rules(_MLP + "hyper.network.", _THEIR_MLP + "hyper.network."),
    _same("hyper", _MLP + "hyper.down.weight", _THEIR_MLP + "hyper.down.weight", "r", "d"),
    _same("hyper", _MLP + "hyper.down.bias", _THEIR_MLP + "hyper.down.bias", "r"),
    _same("hyper", _MLP + "hyper.up.weight", _THEIR_MLP + "hyper.up.weight", "d", "r"),
    _same("hyper", _MLP + "hyper.up.bias", _THEIR_MLP + "hyper.up.bias", "d"),
    *_hypernetwork_rules("hypernetwork.", "model.hypernetwork."),
    *_hypernetwork_rules("hypernetworks.{s}.", "model.hypernetworks.{s}."),
    *_selection_rules("selection_embedding.", "model.selection_embedding."),
    _same("model", "decoder.final_layernorm.weight", "model.norm.weight", "d"),
    _same("head", "output_layer.weight", "lm_head.weight", "V", "d"),
)


TRAINING_ONLY = (
    *(f".mlp.router.{name}" for name in ("quartiles", "offsets", "visits", "threshold")),
    ".mlp.losses.load",
)
"""Controllers from which training makes the thresholds, and the loads that a balance loss remembers. A finished model
has no use for them."""


def _sizes(model: ModelConfig) -> dict[str, int]:
    """What the symbols in `Rule.shape` stand for."""
    d, hd, heads, groups = model.hidden_size, model.head_dim, model.num_attention_heads, model.kv_heads
    sizes = {
        "V": model.vocab_size,
        "d": d,
        "q": heads * hd,
        "qkv": (heads + 2 * groups) * hd,
        "ffn": model.ffn_hidden_size,
        "2ffn": 2 * model.ffn_hidden_size,
    }
    if model.moe is not None:
        sizes |= {"E": model.moe.num_experts, "f": model.moe.ffn_hidden_size, "2f": 2 * model.moe.ffn_hidden_size}
        if isinstance(router := model.moe.router, DAMoERouterConfig):
            sizes |= {"position_buckets": router.position_buckets}
            sizes |= {"thresholds": len(model.moe.selectable) - 1}
        if (hyper := model.moe.hyper) is not None:
            sizes |= {"t": hyper.expert_embedding, "q_process": hyper.process, "c": hyper.condition}
            sizes |= {"rows": 1 if hyper.sharing == "layer" else model.num_layers // (hyper.stages or 1)}
            sizes |= {"m": hyper.layer_embedding, "h": hyper.hidden, "r": hyper.bottleneck}
            sizes |= {"c+m": hyper.condition + hyper.layer_embedding, "r*d": hyper.bottleneck * d}
    return sizes


def _parts(model: ModelConfig) -> set[Part]:
    """The parts of the table that belong to the model as a whole, not to a layer."""
    parts: set[Part] = {"model"}
    if not model.share_embeddings_and_output_weights:
        parts.add("head")
    if model.moe is not None and model.moe.hyper is not None:
        parts.add("hyper")
    return parts


def _layer_parts(model: ModelConfig, layer: int) -> set[Part]:
    if model.moe is None or not model.is_moe_layer(layer):
        return {"layer", "dense"}
    parts: set[Part] = {"layer", "moe"}
    if isinstance(router := model.moe.router, DAMoERouterConfig):
        if router.has_thresholds:
            parts.add("budget")
        if router.importance == "predicted":
            parts.add("predictor")
    if model.moe.hyper is not None:
        parts.add("hyper")
    return parts


# --- the engine -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """A rule for one layer and, where our tensor stacks experts, one expert: a block of ours <-> tensors of theirs."""

    rule: Rule
    ours: str
    theirs: tuple[str, ...]
    full_shape: Shape
    expert: int | None

    @property
    def offset(self) -> Shape:
        """Where this link's block starts in our tensor."""
        return (self.expert or 0,) + (0,) * (len(self.full_shape) - 1) if self.full_shape else ()

    @property
    def block(self) -> Shape:
        """Shape of the block in our tensor."""
        return self.full_shape if self.expert is None else (1, *self.full_shape[1:])


@dataclass(frozen=True)
class Target:
    """One of their tensors as it will be: shape, and whether it must stay fp32 whatever the export's dtype."""

    shape: Shape
    keep_fp32: bool


class ParamMap:
    """The table, expanded for one model. Neither direction holds more than one of our tensors at a time."""

    def __init__(self, model: ModelConfig) -> None:
        self.model = model
        self.links = tuple(_expand(model))

    def ours(self) -> dict[str, Shape]:
        """Our tensors and their shapes."""
        return {link.ours: link.full_shape for link in self.links}

    def theirs(self) -> dict[str, Target]:
        """Their tensors, in the order in which `export` yields them."""
        targets: dict[str, Target] = {}
        for link in self.links:
            parts = self._split(link, torch.empty(link.block, device="meta"))
            targets |= {n: Target(tuple(p.shape), link.rule.keep_fp32) for n, p in zip(link.theirs, parts, strict=True)}
        return targets

    def export(self, source: WeightSource) -> Iterator[tuple[str, Tensor]]:
        """Their tensors, from ours. ConversionError, before any, if a tensor is missing, left over or misshaped."""
        check_tensors(source, self.ours())
        for link in self.links:
            block = source.read(link.ours, link.offset, link.block)
            yield from zip(link.theirs, self._split(link, block), strict=True)

    def invert(self, source: WeightSource) -> Iterator[tuple[str, Tensor]]:
        """Our tensors, from theirs; same errors as `export`."""
        check_tensors(source, {name: target.shape for name, target in self.theirs().items()})
        groups: dict[str, list[Link]] = {}
        for link in self.links:
            groups.setdefault(link.ours, []).append(link)
        for name, links in groups.items():
            blocks = [self._join(link, source) for link in links]
            yield name, blocks[0] if links[0].expert is None else torch.stack(blocks)

    def _split(self, link: Link, block: Tensor) -> tuple[Tensor, ...]:
        matrix = block if link.expert is None else block[0]
        return TRANSFORMS[link.rule.transform].split(matrix, self.model)

    def _join(self, link: Link, source: WeightSource) -> Tensor:
        parts = tuple(read_whole(source, name) for name in link.theirs)
        return TRANSFORMS[link.rule.transform].join(parts, self.model)


def read_whole(source: WeightSource, name: str) -> Tensor:
    """All of one tensor."""
    shape = source.shape(name)
    return source.read(name, (0,) * len(shape), shape)


def check_tensors(source: WeightSource, expected: dict[str, Shape]) -> None:
    """ConversionError unless `source` has exactly these names and shapes."""
    there = set(source.names())
    for problem, names in (
        ("lacks", expected.keys() - there),
        ("has more than the model's config tells:", there - expected.keys()),
    ):
        if names:
            raise ConversionError(f"the source {problem} {len(names)} tensor(s): {_some(names)}")
    for name, shape in expected.items():
        if tuple(source.shape(name)) != shape:
            raise ConversionError(f"{name} has shape {list(source.shape(name))}; the model's config says {list(shape)}")


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:8]) + (f" and {len(ordered) - 8} more" if len(ordered) > 8 else "")


def _expand(model: ModelConfig) -> Iterator[Link]:
    """Every link of the model: what comes before the layers, the layers in order, what comes after."""
    hyper = model.moe.hyper if model.moe is not None else None
    stages = hyper.stages if hyper is not None else None
    here = {name for name, _ in parameter_shapes(model)}
    first_layer_rule = next(n for n, rule in enumerate(RULES) if "{i}" in rule.ours)
    whole = _parts(model)
    for rule in RULES[:first_layer_rule]:
        if rule.part in whole:
            yield from _links(rule, model)
    for layer in range(model.num_layers):
        parts = _layer_parts(model, layer)
        for rule in RULES:
            if (
                "{i}" in rule.ours
                and rule.part in parts
                and (rule.part != "hyper" or rule.ours.format(i=layer) in here)
            ):
                yield from _links(rule, model, layer)
    for rule in RULES[first_layer_rule:]:
        if "{i}" in rule.ours or rule.part not in whole:
            continue
        for stage in range(stages or 0) if "{s}" in rule.ours else (None,):
            if rule.part != "hyper" or rule.ours.format(s=stage) in here:
                yield from _links(rule, model, stage=stage)


def _links(rule: Rule, model: ModelConfig, layer: int | None = None, stage: int | None = None) -> Iterator[Link]:
    sizes = _sizes(model)
    shape = tuple(sizes[symbol] for symbol in rule.shape)
    stacked = any("{e}" in name for name in rule.theirs) and "{e}" not in rule.ours
    for expert in range(shape[0]) if stacked else (None,):
        theirs = tuple(name.format(i=layer, s=stage, e=expert) for name in rule.theirs)
        yield Link(rule, rule.ours.format(i=layer, s=stage), theirs, shape, expert)
