"""Which process holds which part of the model: pure arithmetic on rank numbers, no torch.

The order is Megatron-core's default ("tp-cp-ep-dp-pp", without context parallelism): tensor ranks are neighbors,
pipeline stages are furthest apart. Experts use a second grid over the same ranks of one stage, with an expert tensor
parallel size of 1, so a stage of `tensor * data` ranks is `expert * expert_data` ranks as well.

    rank = tensor_i + tensor * (data_i + data * pipeline_i)
    i    = tensor_i + tensor * data_i;  expert_i = i % expert;  expert_data_i = i // expert
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from moetrain.config.model import ModelConfig
from moetrain.config.schema import ParallelConfig, RunConfig
from moetrain.errors import LayoutError

GroupKind = Literal["tensor", "pipeline", "data", "model", "expert", "expert_data", "embedding"]


@dataclass(frozen=True)
class RankCoordinates:
    """Place of one rank in the dense grid (tensor, data, pipeline) and in its stage's expert grid."""

    tensor: int
    data: int
    pipeline: int
    expert: int
    expert_data: int


# The coordinates that are equal for all ranks of a group of this kind. Two ranks of one `model` group hold different
# parts of one replica; norms and overflow flags are summed over it.
_SHARED: dict[str, Callable[[RankCoordinates], tuple[int, ...]]] = {
    "tensor": lambda at: (at.pipeline, at.data),
    "data": lambda at: (at.pipeline, at.tensor),
    "pipeline": lambda at: (at.data, at.tensor),
    "model": lambda at: (at.data,),
    "expert": lambda at: (at.pipeline, at.expert_data),
    "expert_data": lambda at: (at.pipeline, at.expert),
}


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the parallel dimensions over `world_size` processes. Raises `LayoutError` when they do not fit."""

    world_size: int
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    virtual_pipeline: int = 1

    def __post_init__(self) -> None:
        problems = list(_size_problems(self.world_size, self.tensor, self.pipeline, self.expert, self.virtual_pipeline))
        if problems:
            raise LayoutError("\n".join(problems))

    @property
    def data(self) -> int:
        """Replicas of the dense part."""
        return self.world_size // (self.tensor * self.pipeline)

    @property
    def expert_data(self) -> int:
        """Replicas of each expert."""
        return self.tensor * self.data // self.expert

    def coordinates(self, rank: int) -> RankCoordinates:
        """Where `rank` (0 <= rank < world_size) sits."""
        assert 0 <= rank < self.world_size, f"rank {rank} is outside 0..{self.world_size - 1}"
        pipeline, in_stage = divmod(rank, self.tensor * self.data)
        data, tensor = divmod(in_stage, self.tensor)
        expert_data, expert = divmod(in_stage, self.expert)
        return RankCoordinates(tensor, data, pipeline, expert, expert_data)

    def groups(self, kind: GroupKind) -> tuple[tuple[int, ...], ...]:
        """All groups of a kind, each with its ranks ascending.

        Every rank is in exactly one group of each kind but `embedding`, which holds the first and the last stage of
        each pipeline (the two places of tied embeddings; one rank when there is no pipeline).
        """
        assert kind in get_args(GroupKind), f"{kind!r} is no group kind; legal: {', '.join(get_args(GroupKind))}"
        if kind == "embedding":
            return tuple(tuple(sorted({ranks[0], ranks[-1]})) for ranks in self.groups("pipeline"))
        members: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            members.setdefault(_SHARED[kind](self.coordinates(rank)), []).append(rank)
        return tuple(tuple(ranks) for ranks in members.values())

    def micro_batches(self, global_batch: int, micro_batch: int) -> int:
        """Forward passes of one data-parallel rank per step. Both sizes count sequences."""
        problems = list(_batch_problems(self, global_batch, micro_batch))
        if problems:
            raise LayoutError("\n".join(problems))
        return global_batch // (micro_batch * self.data)

    def layers_of(self, num_layers: int, pipeline_rank: int, chunk: int = 0) -> range:
        """Global numbers of a chunk's layers: chunk v of stage p is block v * pipeline + p, as in Megatron."""
        assert 0 <= pipeline_rank < self.pipeline and 0 <= chunk < self.virtual_pipeline
        blocks = self.pipeline * self.virtual_pipeline
        if num_layers % blocks:
            raise LayoutError(
                f"parallel.pipeline x parallel.virtual_pipeline ({self.pipeline} x {self.virtual_pipeline}) must "
                f"divide model.num_layers ({num_layers})"
            )
        size = num_layers // blocks
        start = (chunk * self.pipeline + pipeline_rank) * size
        return range(start, start + size)

    def describe(self) -> str:
        """One line for people: `8 ranks = tensor 2 x data 2 x pipeline 2; experts: expert 2 x data 2`."""
        text = f"{self.world_size} ranks = tensor {self.tensor} x data {self.data} x pipeline {self.pipeline}"
        if self.virtual_pipeline > 1:
            text += f" (interleaved, {self.virtual_pipeline} chunks)"
        if self.expert > 1:
            text += f"; experts: expert {self.expert} x data {self.expert_data}"
        return text


def check_layout(config: RunConfig, world_size: int) -> ParallelLayout:
    """The layout of this run on `world_size` processes.

    Raises one `LayoutError` that lists every rule that the sizes break, and the nearest layouts that would do.
    """
    par, train = config.parallel, config.training
    sizes = (world_size, par.tensor, par.pipeline, par.expert, par.virtual_pipeline)
    problems = list(_size_problems(*sizes))
    if not problems:
        layout = ParallelLayout(*sizes)
        problems = list(_batch_problems(layout, train.global_batch_size, train.micro_batch_size))
        if not problems:
            return layout
    if world_size >= 1:
        problems.append(_suggestion(config, world_size))
    raise LayoutError("\n".join(problems))


def smallest_world(parallel: ParallelConfig) -> int:
    """The number that the world size must be a multiple of."""
    return parallel.pipeline * math.lcm(parallel.tensor, parallel.expert)


def nearest_layouts(
    world_size: int,
    model: ModelConfig,
    wanted: ParallelConfig,
    *,
    limit: int = 3,
    accepts: Callable[[ParallelLayout], bool] = lambda layout: True,
) -> list[ParallelLayout]:
    """Layouts of `world_size` ranks that this model allows and `accepts` takes, the closest to `wanted` first.

    Closeness is the number of doublings between the sizes, summed over the four dimensions.
    """
    asked = (wanted.tensor, wanted.pipeline, wanted.expert, wanted.virtual_pipeline)

    def distance(layout: ParallelLayout) -> float:
        sizes = (layout.tensor, layout.pipeline, layout.expert, layout.virtual_pipeline)
        return sum(abs(math.log2(size / want)) for size, want in zip(sizes, asked, strict=True))

    legal = [layout for layout in _legal_layouts(world_size, model, wanted.sequence) if accepts(layout)]
    return sorted(legal, key=lambda layout: (distance(layout), layout.tensor, layout.pipeline, layout.expert))[:limit]


def _size_problems(world_size: int, tensor: int, pipeline: int, expert: int, virtual_pipeline: int) -> Iterator[str]:
    """Rules between the sizes alone. Yields one line per broken rule."""
    named = {
        "world size": world_size,
        "parallel.tensor": tensor,
        "parallel.pipeline": pipeline,
        "parallel.expert": expert,
        "parallel.virtual_pipeline": virtual_pipeline,
    }
    too_small = [f"{name} ({size}) must be at least 1" for name, size in named.items() if size < 1]
    if too_small:
        yield from too_small
        return
    if virtual_pipeline > 1 and pipeline == 1:
        yield f"parallel.virtual_pipeline ({virtual_pipeline}) needs parallel.pipeline > 1"
    if world_size % (tensor * pipeline):
        yield (
            f"parallel.tensor x parallel.pipeline ({tensor} x {pipeline} = {tensor * pipeline}) must divide the world "
            f"size ({world_size})"
        )
    elif (world_size // pipeline) % expert:
        yield (
            f"parallel.expert ({expert}) must divide the ranks of one pipeline stage ({world_size} / {pipeline} = "
            f"{world_size // pipeline}); legal: {_join(_divisors(world_size // pipeline))}"
        )


def _batch_problems(layout: ParallelLayout, global_batch: int, micro_batch: int) -> Iterator[str]:
    """Rules between the layout and the batch sizes."""
    step = micro_batch * layout.data
    if global_batch % step:
        below = global_batch // step * step
        legal = [size for size in (below, below + step) if size]
        yield (
            f"training.global_batch_size ({global_batch}) must be a multiple of training.micro_batch_size x "
            f"data-parallel ranks ({micro_batch} x {layout.data} = {step}); nearest: {_join(legal)}"
        )
    elif layout.virtual_pipeline > 1 and (global_batch // step) % layout.pipeline:
        unit = step * layout.pipeline
        yield (
            f"the interleaved schedule (parallel.virtual_pipeline {layout.virtual_pipeline}) needs a number of "
            f"micro-batches ({global_batch // step}) that is a multiple of parallel.pipeline ({layout.pipeline}): make "
            f"training.global_batch_size ({global_batch}) a multiple of {unit}"
        )


def _suggestion(config: RunConfig, world_size: int) -> str:
    """The line that names what would work instead."""
    train = config.training

    def fits_stage(layout: ParallelLayout) -> bool:
        return config.zero.stage < 3 or layout.pipeline == 1

    def fits(layout: ParallelLayout) -> bool:
        return fits_stage(layout) and not list(_batch_problems(layout, train.global_batch_size, train.micro_batch_size))

    near = nearest_layouts(world_size, config.model, config.parallel, accepts=fits)
    if near:
        return "nearest that fit: " + " | ".join(map(_as_overrides, near))
    near = nearest_layouts(world_size, config.model, config.parallel, accepts=fits_stage)
    if near:
        return "nearest that fit the model, with another batch size: " + " | ".join(map(_as_overrides, near))
    return f"no parallel sizes fit this model on {world_size} ranks"


def _as_overrides(layout: ParallelLayout) -> str:
    """The layout in the words of the command line."""
    sizes = ("tensor", "pipeline", "expert", "virtual_pipeline")
    changed = [f"parallel.{name}={getattr(layout, name)}" for name in sizes[:3]]
    if layout.virtual_pipeline > 1:
        changed.append(f"parallel.virtual_pipeline={layout.virtual_pipeline}")
    return " ".join(changed)


def _legal_layouts(world_size: int, model: ModelConfig, sequence: bool) -> Iterator[ParallelLayout]:
    """Every layout of this world that the model's shapes allow."""
    split_by_tensor = [model.num_attention_heads, model.kv_heads, model.ffn_hidden_size, model.vocab_size]
    if sequence or model.moe:
        split_by_tensor.append(model.seq_length)
    experts = model.moe.num_experts if model.moe else 1
    for tensor in _divisors(math.gcd(world_size, *split_by_tensor)):
        if sequence and tensor == 1:
            continue
        for pipeline in _divisors(math.gcd(world_size // tensor, model.num_layers)):
            chunk_counts = _divisors(model.num_layers // pipeline) if pipeline > 1 else [1]
            for expert in _divisors(math.gcd(world_size // pipeline, experts)):
                for chunks in chunk_counts:
                    yield ParallelLayout(world_size, tensor, pipeline, expert, chunks)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _join(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
