from __future__ import annotations

import hashlib
import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moetrain.checkpoint import CheckpointReader, Manifest, Piece, merge_records, save_shard
from moetrain.checkpoint.manifest import DTYPES, MANIFEST_NAME, ShardRecord
from moetrain.errors import CheckpointError


def commit(folder: Path, *records: ShardRecord) -> CheckpointReader:
    manifest = Manifest(7, 56, {"a": 1}, {"world": 2}, {"b": [1.5]}, merge_records(records))
    (folder / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    return CheckpointReader(folder)


def row(name: str, first: int, tensor: torch.Tensor, rows: int = 4) -> Piece:
    return Piece(name, (rows, *tensor.shape[1:]), (first, *[0] * (tensor.dim() - 1)), tensor)


@pytest.mark.parametrize("name", DTYPES)
def test_every_listed_dtype_comes_back_bit_for_bit(tmp_path, name):
    raw = torch.randint(0, 2, (4, 8), dtype=torch.uint8).repeat_interleave(8, 1)
    tensor = raw.view(DTYPES[name][0])
    reader = commit(tmp_path, save_shard(tmp_path, 0, [Piece.whole("t", tensor)]))
    assert reader.dtype("t") == tensor.dtype
    assert torch.equal(reader.read("t").view(torch.uint8), tensor.view(torch.uint8))
    part = reader.read("t", (1, 0), (2, tensor.shape[1]))
    assert torch.equal(part.view(torch.uint8), tensor[1:3].view(torch.uint8))


def test_a_dtype_that_cannot_be_stored_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"torch\.complex64 cannot be stored; legal: float64"):
        save_shard(tmp_path, 0, [Piece.whole("t", torch.zeros(2, dtype=torch.complex64))])


def test_a_shard_file_is_a_safetensors_file_with_the_recorded_checksum(tmp_path):
    a, b, scalar = torch.randn(3, 5), torch.arange(7, dtype=torch.uint8), torch.tensor(2.5)
    record = save_shard(tmp_path, 3, [Piece.whole("b", b), Piece.whole("a", a), Piece.whole("s", scalar)])
    path = tmp_path / "shard-00003.safetensors"
    data = path.read_bytes()
    assert record.files[path.name].bytes == len(data)
    assert record.files[path.name].sha256 == hashlib.sha256(data).hexdigest()
    stored = load_file(path)
    assert torch.equal(stored["a@0,0"], a)
    assert torch.equal(stored["b@0"], b)
    assert torch.equal(stored["s@"], scalar)


def test_every_stored_tensor_is_aligned_to_its_element_size(tmp_path):
    odd, wide, half = torch.ones(3, dtype=torch.uint8), torch.ones(3, dtype=torch.float64), torch.ones(1).bfloat16()
    save_shard(tmp_path, 0, [Piece.whole("odd", odd), Piece.whole("half", half), Piece.whole("wide", wide)])
    data = (tmp_path / "shard-00000.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    starts = {key: 8 + length + entry["data_offsets"][0] for key, entry in table.items()}
    assert (starts["wide@0"] % 8, starts["half@0"] % 2) == (0, 0)


def test_a_rank_above_the_size_limit_writes_several_files(tmp_path):
    tensor = torch.randn(6, 10)
    pieces = [row("t", i, tensor[i : i + 1], rows=6) for i in range(6)]
    record = save_shard(tmp_path, 1, pieces, max_file_bytes=80)
    assert sorted(record.files) == [
        "shard-00001-001.safetensors",
        "shard-00001-002.safetensors",
        "shard-00001.safetensors",
    ]
    assert torch.equal(commit(tmp_path, record).read("t"), tensor)


def test_reading_crosses_ranks_and_reads_any_region(tmp_path):
    tensor = torch.randn(4, 6, 3)
    records = [save_shard(tmp_path, r, [row("t", 2 * r, tensor[2 * r : 2 * r + 2])]) for r in range(2)]
    reader = commit(tmp_path, *records)
    assert torch.equal(reader.read("t"), tensor)
    assert torch.equal(reader.read("t", (1, 2, 1), (2, 3, 2)), tensor[1:3, 2:5, 1:3])
    assert torch.equal(reader.read("t", (3, 0, 0)), tensor[3:])
    assert reader.read("t", (4, 0, 0), (0, 6, 3)).shape == (0, 6, 3)


def test_reading_into_a_strided_view_leaves_the_rest_alone(tmp_path):
    tensor = torch.randn(4, 6)
    reader = commit(tmp_path, save_shard(tmp_path, 0, [Piece.whole("t", tensor)]))
    out = torch.zeros(6, 6)
    reader.read_into("t", (1, 1), out.T[2:5, 0:4])
    assert torch.equal(out.T[2:5, 0:4], tensor[1:4, 1:5])
    assert out.count_nonzero() == 12


def test_empty_tensors_and_empty_pieces_are_kept_and_ignored(tmp_path):
    pieces = [
        Piece.whole("none", torch.zeros(0, 3)),
        Piece("t", (2,), (2,), torch.zeros(0)),
        Piece.whole("t", torch.ones(2)),
    ]
    reader = commit(tmp_path, save_shard(tmp_path, 0, pieces))
    assert reader.read("none").shape == (0, 3)
    assert torch.equal(reader.read("t"), torch.ones(2))


def test_the_reader_tells_what_was_saved(tmp_path):
    reader = commit(
        tmp_path, save_shard(tmp_path, 0, [Piece.whole("b", torch.ones(2)), Piece.whole("a", torch.ones(()))])
    )
    assert (reader.step, reader.consumed_samples) == (7, 56)
    assert (reader.config, reader.layout, reader.extra) == ({"a": 1}, {"world": 2}, {"b": [1.5]})
    assert reader.names() == ["a", "b"]
    assert (reader.shape("a"), reader.shape("b")) == ((), (2,))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda r: r.read("u"), "no tensor 'u'"),
        (lambda r: r.read("t", (1,), (2,)), r"shape \[2\]; asked for the region at offset \[1\] shape \[2\]"),
        (lambda r: r.read("t", (-1,), (1,)), "asked for the region"),
        (lambda r: r.read("t", (0, 0), (1, 1)), "asked for the region"),
        (lambda r: r.read("t", (0, 0)), "asked for the region"),
        (lambda r: r.read_into("t", (0,), torch.zeros(2, dtype=torch.bfloat16)), "stored as float32; asked for as"),
    ],
)
def test_a_request_that_the_checkpoint_cannot_answer_is_refused(tmp_path, ask, message):
    reader = commit(tmp_path, save_shard(tmp_path, 0, [Piece.whole("t", torch.ones(2))]))
    with pytest.raises(CheckpointError, match=message):
        ask(reader)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([Piece("t", (2,), (1,), torch.ones(2))], "does not fit"),
        ([Piece("t", (2, 2), (0,), torch.ones(2))], "does not fit"),
        ([Piece.whole("t", torch.ones(2, 3).T)], "is not contiguous"),
        ([Piece.whole("t", torch.ones(2)), Piece.whole("t", torch.ones(2))], "owned twice by one rank"),
        ([row("t", 0, torch.ones(2, 1)), row("t", 2, torch.ones(2, 1).int())], "pieces disagree"),
        ([Piece.whole("", torch.ones(2))], "a name has 1 to 512"),
    ],
)
def test_an_ill_formed_piece_is_refused_before_anything_is_written(tmp_path, pieces, message):
    with pytest.raises(CheckpointError, match=message):
        save_shard(tmp_path, 0, pieces)
    assert not list(tmp_path.iterdir())


def test_a_hole_is_refused_and_named(tmp_path):
    records = [save_shard(tmp_path, r, [row("t", 3 * r, torch.ones(1, 2))]) for r in range(2)]
    with pytest.raises(
        CheckpointError, match=r"'t' of shape \[4, 2\].*offset \[1, 0\] shape \[2, 2\] is owned by no shard"
    ):
        merge_records(records)


def test_a_doubly_owned_region_is_refused_and_named(tmp_path):
    records = [save_shard(tmp_path, r, [row("t", r, torch.ones(3, 2))]) for r in range(2)]
    match = r"offset \[1, 0\] shape \[2, 2\] is owned by shard-00000.safetensors and shard-00001.safetensors"
    with pytest.raises(CheckpointError, match=match):
        merge_records(records)


@pytest.mark.parametrize("other", [torch.ones(2, 2).double(), torch.ones(2, 3)])
def test_ranks_that_disagree_on_a_tensor_are_refused(tmp_path, other):
    records = [save_shard(tmp_path, 0, [row("t", 0, torch.ones(2, 2))]), save_shard(tmp_path, 1, [row("t", 2, other)])]
    with pytest.raises(CheckpointError, match="ranks disagree on tensor 't': rank 1 has"):
        merge_records(records)


def test_a_shard_file_is_never_overwritten(tmp_path):
    save_shard(tmp_path, 0, [Piece.whole("t", torch.ones(2))])
    with pytest.raises(FileExistsError):
        save_shard(tmp_path, 0, [Piece.whole("t", torch.zeros(2))])
    assert torch.equal(load_file(tmp_path / "shard-00000.safetensors")["t@0"], torch.ones(2))


def test_config_that_is_not_json_is_refused(tmp_path):
    record = save_shard(tmp_path, 0, [Piece.whole("t", torch.ones(2))])
    for bad in (float("nan"), object()):
        with pytest.raises(CheckpointError, match="plain JSON with finite numbers"):
            Manifest(1, 1, {"x": bad}, {}, {}, record).to_bytes()


def test_files_are_read_again_after_close(tmp_path):
    with commit(tmp_path, save_shard(tmp_path, 0, [Piece.whole("t", torch.ones(2))])) as reader:
        reader.read("t")
    (tmp_path / "shard-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        reader.read("t")


def test_reading_a_large_tensor_touches_only_the_asked_region(tmp_path):
    tensor = torch.zeros(2048, 4096)
    reader = commit(tmp_path, save_shard(tmp_path, 0, [Piece.whole("t", tensor)]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    reader.read("t", (1000, 0), (4, 4096))
    touched = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize()
    assert touched < tensor.nbytes / 8
