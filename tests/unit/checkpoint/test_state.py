"""Save under one layout, load under another: the values must be the same, to the bit."""

from __future__ import annotations

import math
import random
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moetrain.checkpoint import (
    CheckpointManager,
    ParameterShard,
    Piece,
    Rect,
    SingleProcess,
    fill_from,
    pieces_of,
    read_rng,
    rng_piece,
    save_shard,
)
from moetrain.checkpoint.manifest import MANIFEST_NAME, Manifest, merge_records
from moetrain.checkpoint.reader import CheckpointReader
from moetrain.errors import CheckpointError
from moetrain.runtime.parameters import Block, ParameterInfo

RANKS = (1, 2, 3, 4, 6)


def gated(name: str, shape: tuple[int, ...], ranks: int) -> list[ParameterShard]:
    """SwiGLU fc1 [2 ffn, d]: every rank has its gate rows, then its up rows."""
    half = shape[0] // 2
    part = half // ranks
    block = (part, *shape[1:])
    size = math.prod(block)
    zeros = (0,) * (len(shape) - 1)
    return [
        ParameterShard(
            name, shape, ((0, Rect((r * part, *zeros), block)), (size, Rect((half + r * part, *zeros), block)))
        )
        for r in range(ranks)
    ]


def split(name: str, shape: tuple[int, ...], dim: int, ranks: int) -> list[ParameterShard]:
    """One rectangle a rank: experts (dimension 0), columns (dimension 1)."""
    part = shape[dim] // ranks
    block = tuple(part if d == dim else n for d, n in enumerate(shape))
    offsets = [tuple(r * part if d == dim else 0 for d in range(len(shape))) for r in range(ranks)]
    return [ParameterShard(name, shape, ((0, Rect(o, block)),)) for o in offsets]


def whole(name: str, shape: tuple[int, ...]) -> list[ParameterShard]:
    return [ParameterShard(name, shape, ((0, Rect.whole(shape)),))]


@st.composite
def tensors(draw):
    """A global shape and two ways to split it over ranks, of the kinds that models have."""
    kind = draw(st.sampled_from(["whole", "split", "gated"]))
    if kind == "whole":
        shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
        return shape, [whole("w", shape)] * 2
    if kind == "gated":
        shape = (24, draw(st.integers(1, 5)))
        return shape, [gated("w", shape, draw(st.sampled_from(RANKS))) for _ in range(2)]
    dim = draw(st.integers(0, 2))
    shape = tuple(12 if d == dim else draw(st.integers(1, 5)) for d in range(draw(st.integers(dim + 1, 4))))
    return shape, [split("w", shape, dim, draw(st.sampled_from(RANKS))) for _ in range(2)]


def local_memory(shard: ParameterShard, tensor: torch.Tensor) -> torch.Tensor:
    """The rank's local parameter as it lies in memory, made without the code under test."""
    zeros = (0,) * tensor.dim()
    return torch.cat([tensor[rect.slices_from(zeros)].reshape(-1) for _, rect in shard.rects])


def cut(numel: int, seed: int) -> list[tuple[int, int]]:
    """Random flat fragments, as any number of ZeRO ranks would own them; some empty."""
    rng = random.Random(seed)
    edges = sorted([0, numel, *(rng.randint(0, numel) for _ in range(rng.randint(0, 4)))])
    return list(pairwise(edges))


@settings(max_examples=150, deadline=None)
@given(tensors(), st.integers(0, 2**16), st.integers(0, 2**16))
def test_any_layout_loads_what_any_other_saved(case, seed_save, seed_load):
    shape, (saving, loading) = case
    tensor = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape) + 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records = []
        for rank, shard in enumerate(saving):
            local = local_memory(shard, tensor)
            pieces = [
                p for a, b in cut(shard.numel, seed_save + rank) for p in pieces_of(shard, "weight.", local[a:b], a)
            ]
            records.append(save_shard(folder, rank, pieces))
        (folder / MANIFEST_NAME).write_bytes(Manifest(1, 0, {}, {}, {}, merge_records(records)).to_bytes())
        with CheckpointReader(folder) as reader:
            for rank, shard in enumerate(loading):
                memory = torch.zeros(shard.numel)
                for a, b in cut(shard.numel, seed_load + rank):
                    fill_from(reader, shard, "weight.", memory[a:b], a)
                assert torch.equal(memory, local_memory(shard, tensor))
            assert torch.equal(reader.read("weight.w"), tensor)


def test_pieces_are_views_so_a_save_needs_no_second_copy():
    shard = gated("w", (8, 3), 2)[1]
    flat = torch.arange(10.0)
    pieces = pieces_of(shard, "optimizer.exp_avg.", flat, 1)
    assert {p.name for p in pieces} == {"optimizer.exp_avg.w"}
    assert sum(p.tensor.numel() for p in pieces) == 10
    storage = flat.untyped_storage()
    assert all(p.tensor.untyped_storage().data_ptr() == storage.data_ptr() for p in pieces)


def test_a_fragment_outside_the_local_parameter_is_refused():
    shard = whole("w", (2, 3))[0]
    with pytest.raises(AssertionError, match=r"w: local elements \[4, 7\) of 6"):
        pieces_of(shard, "weight.", torch.zeros(3), 4)


def test_a_gap_between_rectangles_is_refused():
    with pytest.raises(AssertionError, match="starts at 4, the one before it ends at 3"):
        ParameterShard("w", (2, 3), ((0, Rect((0, 0), (1, 3))), (4, Rect((1, 0), (1, 3)))))


def test_the_models_description_of_a_gated_parameter_becomes_two_rectangles():
    parameter = nn.Parameter(torch.zeros(4, 3))
    blocks = (Block(2, (2, 0)), Block(2, (6, 0)))
    info = ParameterInfo("fc1", parameter, tuple(parameter.shape), (8, 3), blocks, False, True, False, "no", True)
    assert ParameterShard.of(info) == gated("fc1", (8, 3), 2)[1]


def test_a_model_of_another_shape_is_refused(manager: CheckpointManager):
    manager.save(1, 0, [Piece.whole("weight.w", torch.ones(4, 2))], {}, {}, {})
    reader = manager.open()
    assert reader is not None
    with pytest.raises(CheckpointError, match=r"'weight.w' has shape \[4, 2\]; this model needs \[2, 4\]"):
        fill_from(reader, whole("w", (2, 4))[0], "weight.", torch.zeros(8))
    with pytest.raises(CheckpointError, match=r"no tensor 'weight\.v'"):
        fill_from(reader, whole("v", (4, 2))[0], "weight.", torch.zeros(8))
    with pytest.raises(CheckpointError, match=r"stored as float32; asked for as torch\.float64"):
        fill_from(reader, whole("w", (4, 2))[0], "weight.", torch.zeros(8).double())


def test_random_generator_states_come_back_and_unknown_ranks_have_none(tmp_path):
    generator = torch.Generator().manual_seed(5)
    manager = CheckpointManager(tmp_path, 1, SingleProcess())
    manager.save(1, 0, [rng_piece(2, generator.get_state())], {}, {}, {})
    drawn = torch.rand(4, generator=generator)
    reader = manager.open()
    assert reader is not None
    state = read_rng(reader, 2)
    assert state is not None
    assert torch.equal(torch.rand(4, generator=torch.Generator().set_state(state)), drawn)
    assert read_rng(reader, 0) is None
