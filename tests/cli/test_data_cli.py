from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moetrain.cli.data import app
from moetrain.errors import DataError


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the page `prepare-data` has one do: a corpus, a tokenizer, a prepared prefix."""
    path = tmp_path_factory.mktemp("data")
    held_out = ["--held-out", path / "held.jsonl", "--held-out-fraction", 0.1]
    run("corpus", path / "train.jsonl", "--max-bytes", 500_000, *held_out, "--quiet")
    run("tokenizer", path / "train.jsonl", "--output", path / "tok", "--vocab-size", 600)
    run("prepare", path / "train.jsonl", "--output", path / "train", "--tokenizer", path / "tok.model", "--quiet")
    return path


def test_the_commands_make_a_corpus_a_tokenizer_and_a_prefix(folder: Path):
    names = {path.name for path in folder.iterdir()}
    assert names == {"train.jsonl", "held.jsonl", "tok.model", "train.bin", "train.idx", "train.json"}
    sidecar = json.loads((folder / "train.json").read_text())
    assert sidecar["vocab_size"] == 600
    assert sidecar["documents"] == len((folder / "train.jsonl").read_text().splitlines())


def test_inspect_tells_counts_tokenizer_and_text(folder: Path):
    sidecar = json.loads((folder / "train.json").read_text())
    shown = run("inspect", folder / "train", "--tokenizer", folder / "tok.model", "--checksum", "--documents", 2)
    assert f"documents  {sidecar['documents']}\n" in shown
    assert f"tokens     {sidecar['tokens']}\n" in shown
    assert sidecar["tokenizer_fingerprint"] in shown and "checksum   good" in shown
    first = json.loads((folder / "train.jsonl").read_text().splitlines()[0])["text"]
    line = next(line for line in shown.splitlines() if line.startswith("[0]"))
    assert repr(first[:20])[1:-1] in line
    assert "[2]" not in shown


def test_inspect_without_a_tokenizer_shows_ids(folder: Path):
    line = run("inspect", folder / "train", "--documents", 1).splitlines()[-1]
    assert all(word.isdigit() for word in line.split(": ")[1].split())


def test_a_sample_of_the_input_gives_another_tokenizer(folder: Path, tmp_path: Path):
    arguments = ["tokenizer", folder / "train.jsonl", "--vocab-size", 600, "--sample-bytes", 250_000]
    run(*arguments, "--output", tmp_path / "a")
    run(*arguments, "--output", tmp_path / "b")
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    assert (tmp_path / "a.model").read_bytes() != (folder / "tok.model").read_bytes()


def test_errors_come_out_as_data_errors(folder: Path, tmp_path: Path):
    with pytest.raises(DataError, match="refusing to overwrite"):
        run("corpus", folder / "train.jsonl")
    with pytest.raises(DataError, match="was made with tokenizer"):
        run("tokenizer", folder / "train.jsonl", "--output", tmp_path / "other", "--vocab-size", 500)
        run("inspect", folder / "train", "--tokenizer", tmp_path / "other.model")
    with pytest.raises(DataError, match="idx is missing"):
        run("inspect", tmp_path / "nothing")


def test_help_needs_neither_torch_nor_megatron():
    code = "import sys; from moetrain.cli.data import app; app(['prepare', '--help'], standalone_mode=False); "
    code += "print({'torch', 'megatron', 'numpy', 'sentencepiece'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "--workers" in shown and shown.endswith("set()\n")
