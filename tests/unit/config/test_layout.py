"""ParallelLayout against the definition of a grid, and against Megatron's own rank generator."""

from __future__ import annotations

from itertools import product
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrain.config.layout import GroupKind, ParallelLayout, check_layout, nearest_layouts, smallest_world
from moetrain.config.loader import config_from_dict
from moetrain.config.schema import ParallelConfig
from moetrain.errors import LayoutError

PARTITIONS = [kind for kind in get_args(GroupKind) if kind != "embedding"]


@st.composite
def layouts(draw: st.DrawFn) -> ParallelLayout:
    tensor, data, pipeline = (draw(st.integers(1, 4)) for _ in range(3))
    expert = draw(st.sampled_from([n for n in range(1, tensor * data + 1) if tensor * data % n == 0]))
    virtual = draw(st.integers(1, 3)) if pipeline > 1 else 1
    return ParallelLayout(tensor * data * pipeline, tensor, pipeline, expert, virtual)


@given(layouts())
def test_coordinates_are_a_bijection_that_follows_the_stated_order(layout: ParallelLayout) -> None:
    at = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert len({(c.tensor, c.data, c.pipeline) for c in at}) == layout.world_size
    assert len({(c.expert, c.expert_data, c.pipeline) for c in at}) == layout.world_size
    for rank, c in enumerate(at):
        assert rank == c.tensor + layout.tensor * (c.data + layout.data * c.pipeline)
        assert rank == c.expert + layout.expert * (c.expert_data + layout.expert_data * c.pipeline)


@given(layouts())
def test_every_rank_is_in_exactly_one_group_of_each_kind_and_groups_have_the_stated_size(
    layout: ParallelLayout,
) -> None:
    sizes = {
        "tensor": layout.tensor,
        "data": layout.data,
        "pipeline": layout.pipeline,
        "model": layout.tensor * layout.pipeline,
        "expert": layout.expert,
        "expert_data": layout.expert_data,
    }
    for kind in PARTITIONS:
        groups = layout.groups(kind)
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
        assert {len(group) for group in groups} == {sizes[kind]}
        assert all(list(group) == sorted(group) for group in groups)


@given(layouts())
def test_expert_and_expert_data_groups_cross_in_one_rank_and_never_leave_their_stage(layout: ParallelLayout) -> None:
    def stage_of(group: tuple[int, ...]) -> set[int]:
        return {layout.coordinates(rank).pipeline for rank in group}

    for expert, replicas in product(layout.groups("expert"), layout.groups("expert_data")):
        assert len(stage_of(expert)) == len(stage_of(replicas)) == 1
        same_stage = stage_of(expert) == stage_of(replicas)
        assert len(set(expert) & set(replicas)) == (1 if same_stage else 0)


@given(layouts())
def test_embedding_groups_hold_the_first_and_last_stage_of_each_pipeline(layout: ParallelLayout) -> None:
    for embedding, pipeline in zip(layout.groups("embedding"), layout.groups("pipeline"), strict=True):
        assert embedding == ((pipeline[0], pipeline[-1]) if layout.pipeline > 1 else (pipeline[0],))


@given(layouts(), st.integers(1, 3))
def test_every_layer_is_in_exactly_one_chunk(layout: ParallelLayout, layers_per_chunk: int) -> None:
    total = layers_per_chunk * layout.pipeline * layout.virtual_pipeline
    held = [
        layer
        for stage in range(layout.pipeline)
        for chunk in range(layout.virtual_pipeline)
        for layer in layout.layers_of(total, stage, chunk)
    ]
    assert sorted(held) == list(range(total))


def test_interleaved_chunks_take_turns_over_the_stages() -> None:
    layout = ParallelLayout(2, pipeline=2, virtual_pipeline=2)
    chunks = [layout.layers_of(8, stage, chunk) for chunk in (0, 1) for stage in (0, 1)]
    assert chunks == [range(2), range(2, 4), range(4, 6), range(6, 8)]


def test_groups_are_those_of_megatron() -> None:
    from megatron.core.parallel_state import RankGenerator

    tokens = {"tensor": "tp", "data": "dp", "pipeline": "pp", "model": "tp-pp"}
    for tensor, data, pipeline in product((1, 2, 3), (1, 2, 4), (1, 2, 3)):
        stage = tensor * data
        dense = RankGenerator(tp=tensor, ep=1, dp=data, pp=pipeline, cp=1, order="tp-cp-ep-dp-pp")
        for expert in (n for n in range(1, stage + 1) if stage % n == 0):
            layout = ParallelLayout(stage * pipeline, tensor, pipeline, expert)
            experts = RankGenerator(tp=1, ep=expert, dp=stage // expert, pp=pipeline, cp=1, order="tp-cp-ep-dp-pp")
            theirs = {kind: dense.get_ranks(token) for kind, token in tokens.items()}
            theirs |= {"expert": experts.get_ranks("ep"), "expert_data": experts.get_ranks("dp")}
            for kind, groups in theirs.items():
                assert sorted(layout.groups(kind)) == sorted(tuple(group) for group in groups), (layout, kind)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((6, 4, 1, 1, 1), ["parallel.tensor x parallel.pipeline (4 x 1 = 4)", "world size (6)"]),
        ((8, 1, 2, 3, 1), ["parallel.expert (3)", "legal: 1, 2, 4"]),
        ((8, 1, 1, 1, 2), ["virtual_pipeline (2)", "pipeline > 1"]),
        ((0, 1, 1, 1, 1), ["world size (0)", "at least 1"]),
    ],
)
def test_impossible_sizes_are_refused_with_the_rule(sizes: tuple[int, ...], words: list[str]) -> None:
    with pytest.raises(LayoutError) as error:
        ParallelLayout(*sizes)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_micro_batches_are_the_passes_of_one_replica() -> None:
    assert ParallelLayout(8, pipeline=2).micro_batches(global_batch=24, micro_batch=2) == 3
    with pytest.raises(LayoutError, match=r"\(25\) must be a multiple .* = 8\); nearest: 24, 32"):
        ParallelLayout(8, pipeline=2).micro_batches(global_batch=25, micro_batch=2)


def _config(tree: dict[str, Any], **parallel: Any):
    return config_from_dict({**tree, "parallel": parallel}, "test")


def test_check_layout_gives_the_layout_of_a_legal_run(tree: dict[str, Any]) -> None:
    assert check_layout(_config(tree, tensor=2, pipeline=2, expert=2), 8) == ParallelLayout(8, 2, 2, 2)


def test_check_layout_names_nearest_layouts_that_it_then_accepts(tree: dict[str, Any]) -> None:
    with pytest.raises(LayoutError) as error:
        check_layout(_config(tree, tensor=2, pipeline=2, expert=8), 8)
    suggestions = str(error.value).rpartition("nearest that fit: ")[2].split(" | ")
    assert suggestions
    for suggestion in suggestions:
        sizes = {key.removeprefix("parallel."): int(n) for key, n in (word.split("=") for word in suggestion.split())}
        check_layout(_config(tree, **sizes), 8)


def test_a_batch_that_fits_no_layout_is_said_to_be_the_trouble(tree: dict[str, Any]) -> None:
    with pytest.raises(
        LayoutError, match=r"fit the model, with another batch size: parallel.tensor=1 parallel.pipeline=4"
    ):
        check_layout(_config(tree, tensor=2, pipeline=4), 12)


def test_interleaving_needs_micro_batches_in_multiples_of_the_stages(tree: dict[str, Any]) -> None:
    tree["training"]["global_batch_size"] = 3
    with pytest.raises(LayoutError, match=r"number of micro-batches \(3\) .* a multiple of 2"):
        check_layout(_config(tree, pipeline=2, virtual_pipeline=2), 2)


def test_suggestions_respect_zero_3_and_sequence_parallelism(tree: dict[str, Any]) -> None:
    tree["model"]["moe"] = None
    tree["zero"] = {"stage": 3}
    with pytest.raises(LayoutError) as error:
        check_layout(_config(tree, tensor=2, sequence=True), 3)
    assert "no parallel sizes fit" in str(error.value)  # 3 ranks cannot share 4 heads, and sequence needs tensor > 1


def test_nearest_layouts_begin_with_the_wanted_one_when_it_is_legal(tree: dict[str, Any]) -> None:
    config = _config(tree, tensor=2, pipeline=2, expert=4)
    assert nearest_layouts(16, config.model, config.parallel)[0] == ParallelLayout(16, 2, 2, 4)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (2, 1, 3), (1, 4, 8)])
def test_smallest_world_is_the_least_legal_one_and_divides_all_others(sizes: tuple[int, int, int]) -> None:
    tensor, pipeline, expert = sizes
    legal = []
    for world in range(1, 97):
        try:
            ParallelLayout(world, tensor, pipeline, expert)
        except LayoutError:
            continue
        legal.append(world)
    unit = smallest_world(ParallelConfig(tensor=tensor, pipeline=pipeline, expert=expert))
    assert legal == list(range(unit, 97, unit))
