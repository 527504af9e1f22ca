"""Live process groups for a `ParallelLayout`.

Megatron-core's `parallel_state` is initialized here, once, and nowhere else; everything of ours receives a
`ParallelGroups` instead of asking Megatron's globals.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from moetrain.config.layout import ParallelLayout, RankCoordinates
from moetrain.runtime import megatron_cpu


@dataclass(frozen=True)
class ParallelGroups:
    """This rank's process groups. Kinds are those of `ParallelLayout.groups`.

    `embedding` holds the first and last pipeline stage, and is None on the stages between; `alone` holds this rank
    only (ZeRO stage 0 partitions over it, which is to say not at all).
    """

    layout: ParallelLayout
    coordinates: RankCoordinates
    world: dist.ProcessGroup
    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    data: dist.ProcessGroup
    expert: dist.ProcessGroup
    expert_data: dist.ProcessGroup
    model: dist.ProcessGroup
    embedding: dist.ProcessGroup | None
    alone: dist.ProcessGroup

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the first pipeline stage."""
        return self.coordinates.pipeline == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the last pipeline stage."""
        return self.coordinates.pipeline == self.layout.pipeline - 1


def create_groups(layout: ParallelLayout, seed: int) -> ParallelGroups:
    """Build every process group of the layout. Collective over the world; needs an initialized default group.

    Also patches Megatron-core for CPU (a no-op with CUDA) and seeds Megatron's random-state tracker.
    """
    megatron_cpu.install()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(seed)
    rank = dist.get_rank()
    coordinates = layout.coordinates(rank)
    ends = coordinates.pipeline in (0, layout.pipeline - 1)
    alone = dist.new_group([rank], use_local_synchronization=True)
    groups = ParallelGroups(
        layout=layout,
        coordinates=coordinates,
        world=_live(dist.group.WORLD),
        tensor=_live(parallel_state.get_tensor_model_parallel_group()),
        pipeline=_live(parallel_state.get_pipeline_model_parallel_group()),
        data=_live(parallel_state.get_data_parallel_group()),
        expert=_live(parallel_state.get_expert_model_parallel_group()),
        expert_data=_live(parallel_state.get_expert_data_parallel_group()),
        model=_live(parallel_state.get_model_parallel_group()),
        embedding=_live(parallel_state.get_embedding_group()) if ends else None,
        alone=_live(alone),
    )
    _check_agreement(groups)
    return groups


def create_stage_groups(
    groups: ParallelGroups, wanted: Iterable[tuple[int, ...]]
) -> dict[tuple[int, ...], dist.ProcessGroup]:
    """This rank's pipeline cut down to some of its stages, for each of the tuples of stages that it is in and wants.

    Collective over the world, whatever a rank wants: each rank makes the groups of all, in one order. Groups that only
    their members make would do with less, but torch names these by how many groups a rank is in already.
    """
    if groups.layout.pipeline == 1:
        return {}
    pipeline = dist.get_process_group_ranks(groups.pipeline)
    mine = {tuple(pipeline[stage] for stage in stages): stages for stages in wanted}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, sorted(mine))
    found = {}
    for ranks in sorted({ranks for wants in everyone for ranks in wants}):
        whole = len(ranks) == groups.layout.pipeline
        group = groups.pipeline if whole else dist.new_group(list(ranks))
        if ranks in mine:
            found[mine[ranks]] = _live(group)
    return found


def destroy_groups() -> None:
    """Forget Megatron's groups, so that another layout can be built in this process (tests, evaluation)."""
    parallel_state.destroy_model_parallel()


def _live(group: object) -> dist.ProcessGroup:
    """A group that this rank is in: getters also know a number for "not a member", and None for "not built"."""
    assert isinstance(group, dist.ProcessGroup), group
    return group


def _check_agreement(groups: ParallelGroups) -> None:
    """Our arithmetic and Megatron's must name the same ranks, or every gradient sum would be silently wrong."""
    rank = dist.get_rank()
    for kind in ("tensor", "pipeline", "data", "expert", "expert_data", "model"):
        ours = next(g for g in groups.layout.groups(kind) if rank in g)
        theirs = dist.get_process_group_ranks(getattr(groups, kind))
        assert sorted(ours) == sorted(theirs), f"{kind} group of rank {rank}: layout says {ours}, Megatron {theirs}"
