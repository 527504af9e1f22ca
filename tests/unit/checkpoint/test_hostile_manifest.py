from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from moetrain.checkpoint import CheckpointReader, Manifest
from moetrain.checkpoint.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, seal
from moetrain.errors import CheckpointError


@pytest.fixture
def folder(save_step) -> Path:
    return save_step(3)


def rewrite(folder: Path, change) -> None:
    """Change the manifest's JSON and give it a valid sum again, as an attacker would."""
    path = folder / MANIFEST_NAME
    value = json.loads(path.read_bytes())
    del value["sha256"]
    change(value)
    path.write_bytes(seal(value))


def in_tensor(**changes):
    return lambda m: m["tensors"]["weight.a"].update(changes)


def in_shard(**changes):
    return lambda m: m["tensors"]["weight.a"]["shards"][0].update(changes)


def grown(rows: int):
    """A tensor and its last shard say that they have more rows than the file can hold."""

    def change(m):
        tensor = m["tensors"]["weight.a"]
        tensor["shape"][0] += rows
        tensor["shards"][-1]["shape"][0] += rows

    return change


def renamed(new: str):
    """The shard file under another name, everywhere in the manifest."""

    def change(m):
        m["files"] = {new: next(iter(m["files"].values()))}
        for tensor in m["tensors"].values():
            for shard in tensor["shards"]:
                shard["file"] = new

    return change


HOSTILE = {
    "path traversal": (renamed("../shard-00000.safetensors"), "must look like"),
    "absolute path": (renamed("/etc/passwd"), "must look like"),
    "folder in the name": (renamed("a/shard-00000.safetensors"), "must look like"),
    "line end in the name": (renamed("shard-00000.safetensors\n"), "must look like"),
    "unlisted file": (in_shard(file="shard-00009.safetensors"), "does not list under 'files'"),
    "negative shape": (in_tensor(shape=[-4, 3]), "whole numbers"),
    "absurd shape": (in_tensor(shape=[2**40, 2**40]), "more than 2\\^63"),
    "shape beyond its shards": (in_tensor(shape=[2**31, 3]), "owned by no shard"),
    "more elements than bytes": (grown(10_000), "is said to hold"),
    "endless dimensions": (in_tensor(shape=[1] * 1000), "at most 8"),
    "fractional shape": (in_tensor(shape=[4.0, 3]), "whole numbers"),
    "boolean shape": (in_tensor(shape=[True, 3]), "whole numbers"),
    "shape as text": (in_tensor(shape="4,3"), "must be of type list"),
    "offset out of bounds": (in_shard(offset=[3, 0]), "does not fit"),
    "negative offset": (in_shard(offset=[-1, 0]), "whole numbers"),
    "offset of another rank": (in_shard(offset=[0]), "does not fit"),
    "overlap": (in_shard(shape=[3, 3]), "owned by shard-00000.safetensors and"),
    "hole": (in_shard(shape=[1, 3]), "owned by no shard"),
    "empty shard": (in_shard(shape=[0, 3]), "does not fit"),
    "unknown dtype": (in_tensor(dtype="object"), "dtype 'object' is unknown"),
    "wider dtype than stored": (in_tensor(dtype="float64"), "is \\('F32'"),
    "tensor without a name": (lambda m: m["tensors"].update({"": m["tensors"]["weight.a"]}), "1 to 512 characters"),
    "tensor that is no object": (lambda m: m["tensors"].update(x=3), "must be a JSON object"),
    "shard that is no object": (lambda m: m["tensors"]["weight.a"].update(shards=[[]]), "must be a JSON object"),
    "bad checksum": (lambda m: next(iter(m["files"].values())).update(sha256="0" * 63), "64 lower-case"),
    "negative size": (lambda m: next(iter(m["files"].values())).update(bytes=-1), "between 0 and"),
    "boolean step": (lambda m: m.update(step=True), "'step' must be of type int"),
    "negative step": (lambda m: m.update(step=-1), "between 0 and"),
    "no config": (lambda m: m.pop("config"), "lacks 'config'"),
    "another format": (lambda m: m.update(format="pickle"), "this program reads"),
    "a later version": (lambda m: m.update(version=2), "this program reads"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_refused(folder, name):
    change, message = HOSTILE[name]
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(folder, verify="none").read("weight.a")


def test_a_shard_that_the_file_does_not_hold_is_refused(folder):
    rewrite(folder, in_shard(key="elsewhere"))
    with pytest.raises(CheckpointError, match="lacks 'elsewhere'"):
        CheckpointReader(folder).read("weight.a")


def test_a_manifest_that_swaps_tensors_of_other_shapes_is_refused(folder):
    rewrite(folder, in_shard(key="controller.alpha@"))
    with pytest.raises(CheckpointError, match="the manifest says"):
        CheckpointReader(folder).read("weight.a")


@pytest.mark.parametrize(
    "text",
    [b"", b"\x80\x04\x95", b"[]", b"3", b"null", b'{"step": NaN}', b"[" * 100_000, b'{"step": ' + b"9" * 10_000 + b"}"],
)
def test_a_file_that_is_no_sealed_json_object_is_refused(folder, text):
    (folder / MANIFEST_NAME).write_bytes(text)
    with pytest.raises(CheckpointError, match="damaged or edited"):
        Manifest.load(folder)


@pytest.mark.parametrize(
    "body", [b'{"step":NaN', b'{"a":' + b"[" * 100_000, b'{"step":' + b"9" * 10_000, b'{"a":"\xff"']
)
def test_sealed_text_that_is_no_json_is_refused(folder, body):
    tail = f',"sha256":"{hashlib.sha256(body).hexdigest()}"}}\n'.encode()
    (folder / MANIFEST_NAME).write_bytes(body + tail)
    with pytest.raises(CheckpointError, match="not valid JSON"):
        Manifest.load(folder)


def test_a_huge_manifest_is_refused_without_reading_it(folder):
    with (folder / MANIFEST_NAME).open("ab") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    with pytest.raises(CheckpointError, match="the limit is"):
        Manifest.load(folder)


@pytest.mark.parametrize("name", [MANIFEST_NAME, "shard-00000.safetensors"])
def test_links_are_refused_even_when_their_target_is_sound(folder, tmp_path, name):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="must be a regular file"):
        CheckpointReader(folder, verify="none").read("weight.a")


def test_a_shard_file_that_is_no_safetensors_file_is_refused(folder):
    path = folder / "shard-00000.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(CheckpointError, match="damaged, not a safetensors file"):
        CheckpointReader(folder, verify="size").read("weight.a")
