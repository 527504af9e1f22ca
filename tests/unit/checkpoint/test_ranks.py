"""Four gloo ranks in one launch; each test states one thing that they observed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from moetrain.checkpoint import (
    CheckpointManager,
    CheckpointReader,
    ParameterShard,
    Piece,
    Rect,
    TorchDistributed,
    fill_from,
    pieces_of,
    rng_piece,
)
from moetrain.errors import CheckpointError

RANKS = 4
FC1, EXPERTS, BIAS = (16, 5), (8, 6, 3), (7,)


def tensor(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fc1_shard(rank: int, ranks: int) -> ParameterShard:
    """Gate rows, then up rows, of a tensor-parallel rank."""
    part = FC1[0] // 2 // ranks
    gate, up = Rect((rank * part, 0), (part, FC1[1])), Rect((FC1[0] // 2 + rank * part, 0), (part, FC1[1]))
    return ParameterShard("fc1", FC1, ((0, gate), (gate.numel, up)))


def expert_shard(rank: int, ranks: int) -> ParameterShard:
    part = EXPERTS[0] // ranks
    return ParameterShard("experts", EXPERTS, ((0, Rect((rank * part, 0, 0), (part, *EXPERTS[1:]))),))


def memory(shard: ParameterShard, whole: torch.Tensor) -> torch.Tensor:
    zeros = (0,) * whole.dim()
    return torch.cat([whole[rect.slices_from(zeros)].reshape(-1) for _, rect in shard.rects])


def four_rank_pieces(rank: int) -> Iterator[Piece]:
    """fc1: tensor parallel 2 x ZeRO 2 (a flat cut off the row edges); experts: expert parallel 4; bias: rank 3's."""
    tp, zero = rank // 2, rank % 2
    shard = fc1_shard(tp, 2)
    flat = memory(shard, tensor(FC1, 1))
    start, stop = (0, 13) if zero == 0 else (13, shard.numel)
    yield from pieces_of(shard, "weight.", flat[start:stop], start)
    experts = expert_shard(rank, 4)
    yield from pieces_of(experts, "weight.", memory(experts, tensor(EXPERTS, 2)))
    if rank == 3:
        yield Piece.whole("weight.bias", tensor(BIAS, 3))
    yield rng_piece(rank, torch.full((8,), rank, dtype=torch.uint8))


def error_of(action) -> str | None:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return None


def save(manager: CheckpointManager, step: int, pieces) -> Path:
    return manager.save(step, step * 10, pieces, {"model": {}}, {"world_size": RANKS}, {})


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.name != ".lock")


def observe(rank: int, root: Path) -> dict[str, Any]:
    comm = TorchDistributed()
    manager = CheckpointManager(root, 3, comm)
    seen: dict[str, Any] = {"gathered": comm.gather_objects({"rank": rank, "text": "ä" * rank * 100})}
    seen["broadcast"] = comm.broadcast_object(f"from {rank}")
    save(manager, 1, four_rank_pieces(rank))
    dist.barrier()
    seen["after_first"] = names(root)

    def failing():
        yield from four_rank_pieces(rank)
        if rank == 2:
            raise RuntimeError("rank two is unwell")

    seen["failed"] = error_of(lambda: save(manager, 2, failing()))
    twice = [*four_rank_pieces(rank), *([Piece.whole("weight.bias", tensor(BIAS, 3))] if rank == 1 else [])]
    seen["twice"] = error_of(lambda: save(manager, 2, twice))
    hole = [p for p in four_rank_pieces(rank) if not (rank == 1 and p.name == "weight.experts")]
    seen["hole"] = error_of(lambda: save(manager, 2, hole))
    double = (Piece(p.name, p.global_shape, p.offset, p.tensor.double() if rank == 1 else p.tensor) for p in hole)
    seen["dtype"] = error_of(lambda: save(manager, 2, double))
    dist.barrier()
    seen["after_failures"] = names(root)
    seen["private"] = error_of(
        lambda: save(CheckpointManager(root.parent / f"own-{rank}", 3, comm), 1, four_rank_pieces(rank))
    )
    seen |= observe_damage(rank, root, manager)
    seen |= observe_two_ranks(rank, root)
    return seen


def observe_damage(rank: int, root: Path, manager: CheckpointManager) -> dict[str, Any]:
    newest = save(manager, 2, four_rank_pieces(rank))
    hashed: list[str] = []
    check = CheckpointReader.verify_files

    def noting(reader, names=None, checksum=True):
        hashed.extend(names if checksum and names is not None else [])
        check(reader, names, checksum)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointReader, "verify_files", noting)
        opened = manager.open()
    assert opened is not None
    other = root / f"step-0000000{1 + rank % 2}"
    different = error_of(lambda: manager.open(other))
    dist.barrier()
    if rank == 0:
        path = newest / "shard-00002.safetensors"
        data = bytearray(path.read_bytes())
        data[-3] ^= 4
        path.write_bytes(data)
    dist.barrier()
    fallback = manager.open()
    assert fallback is not None
    seen = {"sound_step": opened.step, "hashed": hashed, "fallback_step": fallback.step, "skipped": manager.skipped}
    seen["different"] = different
    seen["asked_damaged"] = error_of(lambda: manager.open(newest))
    seen["latest"] = str(manager.latest())
    return seen


def observe_two_ranks(rank: int, root: Path) -> dict[str, Any]:
    """Ranks 1 and 3 alone, under another layout."""
    group = dist.new_group([1, 3])
    if not isinstance(group, dist.ProcessGroup) or rank not in (1, 3):
        return {}
    comm = TorchDistributed(group)
    reader = CheckpointManager(root, 3, comm).open(root / "step-00000001")
    assert reader is not None
    seen: dict[str, Any] = {"group_rank": comm.rank}
    for name, shard, whole in (
        ("fc1", fc1_shard(comm.rank, 2), tensor(FC1, 1)),
        ("experts", expert_shard(comm.rank, 2), tensor(EXPERTS, 2)),
    ):
        flat = torch.zeros(shard.numel)
        for start in range(0, shard.numel, 11):
            fill_from(reader, shard, "weight.", flat[start : start + 11], start)
        seen[name] = torch.equal(flat, memory(shard, whole))
    return seen


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, timedelta(seconds=60), RANKS, rank)
    seen = observe(rank, folder / "checkpoints")
    (folder / f"seen-{rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    start_processes(run_rank, (folder,), nprocs=RANKS, start_method="fork")
    return folder


@pytest.fixture(scope="module")
def seen(folder) -> list[dict[str, Any]]:
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in range(RANKS)]


def test_objects_of_different_lengths_are_gathered_in_rank_order(seen):
    assert seen[0]["gathered"] == [{"rank": r, "text": "ä" * r * 100} for r in range(RANKS)]
    assert [s["gathered"] for s in seen[1:]] == [None] * 3
    assert [s["broadcast"] for s in seen] == ["from 0"] * RANKS


def test_one_process_without_a_group_reads_what_four_ranks_saved(folder, seen):
    reader = CheckpointReader(folder / "checkpoints" / "step-00000001")
    assert sorted(reader.files()) == [f"shard-0000{r}.safetensors" for r in range(RANKS)]
    for name, shape, seed in (("fc1", FC1, 1), ("experts", EXPERTS, 2), ("bias", BIAS, 3)):
        assert torch.equal(reader.read(f"weight.{name}"), tensor(shape, seed))
    assert reader.read("rng.3").tolist() == [3] * 8
    assert seen[0]["after_first"] == ["latest", "step-00000001"]


def test_two_ranks_of_a_subgroup_read_what_four_ranks_saved(seen):
    assert [(seen[r]["group_rank"], seen[r]["fc1"], seen[r]["experts"]) for r in (1, 3)] == [
        (0, True, True),
        (1, True, True),
    ]


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("failed", "rank 2: RuntimeError: rank two is unwell"),
        ("twice", "'weight.bias' of shape [7]"),
        ("hole", "'weight.experts' of shape [8, 6, 3]"),
        ("dtype", "ranks disagree on tensor"),
        ("different", "ranks see different checkpoints"),
        ("private", "FileNotFoundError"),
    ],
)
def test_when_one_rank_fails_every_rank_raises_with_the_reason(seen, what, told):
    assert all(s[what] is not None and told in s[what] for s in seen)
    assert len({s[what] for s in seen}) == 1


def test_a_hole_and_a_double_owner_name_region_and_files(seen):
    assert "region at offset [2, 0, 0] shape [2, 6, 3] is owned by no shard" in seen[3]["hole"]
    assert "owned by shard-00001.safetensors and shard-00003.safetensors" in seen[2]["twice"]


def test_failed_saves_commit_nothing_and_leave_nothing(seen):
    assert all(s["after_failures"] == ["latest", "step-00000001"] for s in seen)


def test_ranks_share_the_hashing(seen):
    hashed = sorted(name for s in seen for name in s["hashed"])
    assert hashed == [f"shard-0000{r}.safetensors" for r in range(RANKS)]
    assert all(len(s["hashed"]) == 1 for s in seen)
    assert all(s["sound_step"] == 2 for s in seen)


def test_damage_seen_by_one_rank_sends_all_to_the_previous_checkpoint(seen):
    assert [s["fallback_step"] for s in seen] == [1] * RANKS
    assert all("shard-00002.safetensors: damaged" in s["skipped"][0] for s in seen)
    assert all("shard-00002.safetensors: damaged" in s["asked_damaged"] for s in seen)


def test_all_ranks_agree_on_the_latest(seen):
    assert len({s["latest"] for s in seen}) == 1
