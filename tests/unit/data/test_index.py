from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from moetrain.data.index import HEADER, read_index, verify_prefix
from moetrain.errors import DataError


@dataclass
class OtherTokenizer:
    """Has another fingerprint."""

    vocab_size: int = 320
    fingerprint: str = "ab" * 32


def _file(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(f"{prefix.name}.{suffix}")


def _refused(prefix: Path, message: str, **checks: object) -> None:
    with pytest.raises(DataError, match=message):
        verify_prefix(prefix, **checks)


def test_a_prepared_prefix_is_good_for_its_own_tokenizer(prefix: Path, tokenizer):
    index, sidecar = verify_prefix(prefix, tokenizer, tokenizer.vocab_size, checksum=True)
    assert sidecar is not None
    assert (index.documents, index.tokens) == (sidecar.documents, sidecar.tokens) == (60, int(index.lengths.sum()))
    assert index.max_token() == sidecar.max_token


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_missing_half_is_refused(private_prefix: Path, suffix: str):
    _file(private_prefix, suffix).unlink()
    _refused(private_prefix, rf"small\.{suffix} is missing")


@pytest.mark.parametrize("change", [-1, -1000, +2])
@pytest.mark.parametrize("with_sidecar", [True, False])
def test_a_bin_of_another_size_is_refused(private_prefix: Path, change: int, with_sidecar: bool):
    if not with_sidecar:
        _file(private_prefix, "json").unlink()
    path = _file(private_prefix, "bin")
    os.truncate(path, path.stat().st_size + change)
    _refused(private_prefix, r"small\.bin has \d+ bytes, but its index announces \d+ tokens")


@pytest.mark.parametrize("size", [0, 5, 20, HEADER.size, HEADER.size + 100, -1])
def test_an_idx_of_any_shorter_size_is_refused(private_prefix: Path, size: int):
    path = _file(private_prefix, "idx")
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    _refused(private_prefix, r"small\.idx (is not a Megatron index|ends inside its header|is truncated)")


def test_a_foreign_idx_is_refused(private_prefix: Path):
    _file(private_prefix, "idx").write_bytes(b"PK\x03\x04" * 200)
    _refused(private_prefix, r"small\.idx is not a Megatron index")


def test_an_unknown_dtype_is_refused(private_prefix: Path):
    path = _file(private_prefix, "idx")
    content = bytearray(path.read_bytes())
    content[17] = 99
    path.write_bytes(content)
    _refused(private_prefix, "dtype code 99")


def test_an_idx_whose_offsets_contradict_its_lengths_is_refused(private_prefix: Path):
    path = _file(private_prefix, "idx")
    offsets = numpy.memmap(path, numpy.int64, "r+", HEADER.size + 4 * 60, (60,))
    offsets[-1] += 2
    offsets.flush()
    _refused(private_prefix, "contradicts itself")


def test_files_of_two_runs_are_refused(private_prefix: Path):
    path = _file(private_prefix, "json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "documents": 61}))
    _refused(private_prefix, "files of different runs")


def test_a_damaged_sidecar_is_refused(private_prefix: Path):
    _file(private_prefix, "json").write_text('{"format": "moetrain-indexed"')
    _refused(private_prefix, r"small\.json is damaged")


def test_a_changed_token_shows_in_the_checksum(private_prefix: Path):
    path = _file(private_prefix, "bin")
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    verify_prefix(private_prefix)
    _refused(private_prefix, r"small\.bin does not have the SHA-256", checksum=True)


def test_another_tokenizer_is_refused(prefix: Path, tokenizer):
    message = f"made with tokenizer {tokenizer.fingerprint[:12]} .* given is abababababab"
    _refused(prefix, message, tokenizer=OtherTokenizer())


@pytest.mark.parametrize("with_sidecar", [True, False])
def test_a_token_beyond_the_models_vocabulary_is_refused(private_prefix: Path, with_sidecar: bool):
    top = read_index(private_prefix).max_token()
    if not with_sidecar:
        _file(private_prefix, "json").unlink()
    verify_prefix(private_prefix, vocab_size=top + 1)
    _refused(private_prefix, f"holds token id {top}; model.vocab_size {top} allows at most {top - 1}", vocab_size=top)


def test_a_prefix_that_megatron_wrote_is_accepted_without_a_sidecar(tmp_path: Path):
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=numpy.int32)
    builder.add_document(numpy.arange(5), [2, 3])
    builder.finalize(str(tmp_path / "m.idx"))
    index, sidecar = verify_prefix(tmp_path / "m")
    assert sidecar is None
    assert (index.documents, len(index.lengths), index.sequence(1).tolist()) == (1, 2, [2, 3, 4])


def test_a_prefix_without_documents_is_refused(tmp_path: Path):
    IndexedDatasetBuilder(str(tmp_path / "m.bin")).finalize(str(tmp_path / "m.idx"))
    _refused(tmp_path / "m", "holds no document")


def test_looking_into_a_prefix_and_encoding_need_no_torch():
    code = "import sys, moetrain.data.index, moetrain.data.encode; print({'torch', 'megatron'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"
