"""How our tensors and those of other people's formats correspond: the engine that reads a table either way.

A table is data: one `Rule` for each kind of tensor (`moetrain/convert/architectures` holds one table per architecture).
Our names and shapes are layout free: one tensor per parameter of the whole model, experts stacked in the first
dimension. The model's config alone says which tensors there are; a tensor without a rule, and one that is missing, left
over or misshaped, stops a conversion with its name.

In names, `{i}` is a layer, `{s}` a group of layers that share a hypernetwork, and `{e}`, on their side only, an expert:
an index into our first dimension.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from moetrain.config.da_moe import DAMoERouterConfig
from moetrain.config.model import ModelConfig
from moetrain.config.routers import ExpertBiasRouterConfig
from moetrain.config.size import parameter_shapes
from moetrain.errors import ConversionError

Shape = tuple[int, ...]

TRAINING_ONLY = (".mlp.losses.load",)
"""Controllers that stay behind: the loads of one step, which a balance loss remembers until the next."""


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
    """[(H + 2G) hd, ...] -> q [H hd, ...], k [G hd, ...], v [G hd, ...]; a weight or a bias.

    Megatron keeps each query group together: its H/G query heads, its key head, its value head.
    """
    groups, queries = model.kv_heads, model.num_attention_heads // model.kv_heads
    heads = qkv.reshape(groups, queries + 2, model.head_dim, *qkv.shape[1:])
    return tuple(part.flatten(0, 2) for part in heads.split((queries, 1, 1), dim=1))


def _join_qkv(parts: tuple[Tensor, ...], model: ModelConfig) -> Tensor:
    heads = [part.reshape(model.kv_heads, -1, model.head_dim, *part.shape[1:]) for part in parts]
    return torch.cat(heads, dim=1).flatten(0, 2)


def _split_identity(tensor: Tensor, _: ModelConfig) -> tuple[Tensor, ...]:
    return (tensor,)


def _join_identity(parts: tuple[Tensor, ...], _: ModelConfig) -> Tensor:
    return parts[0]


def _split_unscaled_qkv(qkv: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    """For attention that does not divide its scores by the root of the head's width, as ours does (T5)."""
    query, key, value = _split_qkv(qkv, model)
    return query / math.sqrt(model.head_dim), key, value


def _join_unscaled_qkv(parts: tuple[Tensor, ...], model: ModelConfig) -> Tensor:
    query, key, value = parts
    return _join_qkv((query * math.sqrt(model.head_dim), key, value), model)


@dataclass(frozen=True)
class Transform:
    """One of our tensors as several of theirs, and back."""

    split: Callable[[Tensor, ModelConfig], tuple[Tensor, ...]]
    join: Callable[[tuple[Tensor, ...], ModelConfig], Tensor]


TRANSFORMS = {
    "identity": Transform(_split_identity, _join_identity),
    "split_gate_up": Transform(_split_gate_up, _join_gate_up),
    "split_qkv": Transform(_split_qkv, _join_qkv),
    "split_unscaled_qkv": Transform(_split_unscaled_qkv, _join_unscaled_qkv),
}


# --- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """One line of a table.

    Attributes:
        ours, theirs: names; several of theirs where the transform splits.
        keep_fp32: the tensor is not rounded to the dtype of an export.
        stacked: their tensor stacks experts as ours does, and is read expert by expert.
    """

    ours: str
    theirs: tuple[str, ...]
    transform: str = "identity"
    keep_fp32: bool = False
    stacked: bool = False

    @property
    def by_expert(self) -> bool:
        """Whether our tensor is taken apart by experts."""
        return self.stacked or "{e}" in self.theirs[0]


def same(ours: str, theirs: str, keep_fp32: bool = False) -> Rule:
    """A tensor that only has another name."""
    return Rule(ours, (theirs,), keep_fp32=keep_fp32)


@cache
def _pattern(ours: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(ours)))


def model_tensors(model: ModelConfig) -> Iterator[tuple[str, Shape]]:
    """Name and shape of all that a model is: weights, and its routers' controllers with what they are made from."""
    for name, shape in parameter_shapes(model):
        yield name, shape
        if name.endswith(".router.weight"):
            prefix = name.removesuffix("weight")
            yield from ((prefix + controller, size) for controller, size in _controllers(model))


def _controllers(model: ModelConfig) -> Iterator[tuple[str, Shape]]:
    assert model.moe is not None
    match model.moe.router:
        case DAMoERouterConfig() as router if router.has_thresholds:
            buckets, number = router.position_buckets, len(model.moe.selectable) - 1
            yield from (("thresholds", (buckets, number)), ("quartiles", (buckets, 2)), ("offsets", (buckets, number)))
            yield from (("visits", (buckets,)), ("threshold", ()))
        case ExpertBiasRouterConfig():
            yield "bias", (model.moe.num_choices,)


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
    """A table, expanded for one model. Neither direction holds more than one of our blocks at a time: an expert's
    matrix, or another tensor."""

    def __init__(self, model: ModelConfig, rules: Sequence[Rule]) -> None:
        """ConversionError where the table has no rule for a tensor of the model."""
        self.model = model
        self.links = tuple(_expand(model, rules))
        self.link_of = {name: link for link in self.links for name in link.theirs}

    def ours(self) -> dict[str, Shape]:
        """Our tensors and their shapes."""
        return {link.ours: link.full_shape for link in self.links}

    def theirs(self) -> dict[str, Target]:
        """Their tensors, in the order in which `export` yields them."""
        targets: dict[str, Target] = {}
        for link in self.links:
            if link.rule.stacked:
                targets[link.theirs[0]] = Target(link.full_shape, link.rule.keep_fp32)
                continue
            parts = self.split(link, torch.empty(link.block, device="meta"))
            targets |= {n: Target(tuple(p.shape), link.rule.keep_fp32) for n, p in zip(link.theirs, parts, strict=True)}
        return targets

    def export(self, source: WeightSource) -> Iterator[tuple[str, Tensor]]:
        """Their tensors, from ours. ConversionError, before any, if a tensor is missing, left over or misshaped."""
        check_tensors(source, self.ours())
        for link in self.links:
            block = source.read(link.ours, link.offset, link.block)
            yield from zip(link.theirs, self.split(link, block), strict=True)

    def blocks(self, source: WeightSource) -> Iterator[tuple[Link, Tensor]]:
        """Our tensors from theirs, block by block; same errors as `export`."""
        check_tensors(source, {name: target.shape for name, target in self.theirs().items()})
        for link in self.links:
            yield link, self._join(link, source).reshape(link.block)

    def invert(self, source: WeightSource) -> Iterator[tuple[str, Tensor]]:
        """Our tensors, from theirs; same errors as `export`."""
        parts: list[Tensor] = []
        for link, block in self.blocks(source):
            parts.append(block)
            if link.expert is None or link.expert == link.full_shape[0] - 1:
                yield link.ours, parts[0] if len(parts) == 1 else torch.cat(parts)
                parts = []

    def split(self, link: Link, block: Tensor) -> tuple[Tensor, ...]:
        """Their tensors of a link, from its block of ours."""
        assert not link.rule.stacked, "a stacked spelling is only read"
        matrix = block if link.expert is None else block[0]
        return TRANSFORMS[link.rule.transform].split(matrix, self.model)

    def _join(self, link: Link, source: WeightSource) -> Tensor:
        if link.rule.stacked:
            return source.read(link.theirs[0], link.offset, link.block)
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


def _expand(model: ModelConfig, rules: Sequence[Rule]) -> Iterator[Link]:
    """Every link of the model, in the order of its tensors."""
    for name, shape in model_tensors(model):
        rule, indices = _rule_of(name, rules)
        for expert in range(shape[0]) if rule.by_expert else (None,):
            theirs = tuple(their.format(**indices, e=expert) for their in rule.theirs)
            yield Link(rule, name, theirs, shape, expert)


def _rule_of(name: str, rules: Sequence[Rule]) -> tuple[Rule, dict[str, str]]:
    """The rule for one of our tensors, and the numbers in its name."""
    for rule in rules:
        if match := _pattern(rule.ours).fullmatch(name):
            return rule, match.groupdict()
    raise ConversionError(f"the other format has no place for the model's tensor {name}")
