from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from moetrain.config.schema import TokenizerConfig
from moetrain.data import documents, encode
from moetrain.data.index import read_index, sha256_of, verify_prefix
from moetrain.data.prepare import prepare
from moetrain.data.tokenizers import SentencePieceTokenizer
from moetrain.errors import DataError


def test_files_are_the_same_for_one_and_for_three_workers(
    tmp_path: Path, tokenizer_config: TokenizerConfig, source_texts, write_jsonl
):
    many = write_jsonl(tmp_path / "many.jsonl", source_texts(12_000))  # several blocks
    assert len(list(documents.read_blocks([many]))) >= 3
    for workers in (1, 3):
        prepare([many], tmp_path / f"w{workers}", tokenizer_config, workers)
    for suffix in ("bin", "idx", "json"):
        assert (tmp_path / f"w1.{suffix}").read_bytes() == (tmp_path / f"w3.{suffix}").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_megatron_reads_the_documents_back(
    tmp_path: Path, tokenizer_config, tokenizer: SentencePieceTokenizer, source_texts, write_jsonl
):
    texts = source_texts(7)
    sidecar = prepare([write_jsonl(tmp_path / "in.jsonl", texts)], tmp_path / "out.v1", tokenizer_config)
    dataset = IndexedDataset(str(tmp_path / "out.v1"))
    assert [tokenizer.decode(ids[:-1].tolist()) for ids in dataset[0:7]] == texts
    assert all(ids[-1] == tokenizer.eod for ids in dataset[0:7])
    assert (sidecar.documents, sidecar.tokens, sidecar.dtype) == (7, int(dataset.sequence_lengths.sum()), "uint16")
    assert sidecar.max_token == max(int(ids.max()) for ids in dataset[0:7])
    assert (sidecar.tokenizer_fingerprint, sidecar.vocab_size) == (tokenizer.fingerprint, tokenizer.vocab_size)
    assert sidecar.bin.sha256 == sha256_of(tmp_path / "out.v1.bin")
    del dataset


def test_without_eod_documents_are_their_text_alone(tmp_path: Path, tokenizer_config, tokenizer):
    (tmp_path / "one.txt").write_text("some text")
    prepare([tmp_path / "one.txt"], tmp_path / "out", tokenizer_config, append_eod=False)
    assert read_index(tmp_path / "out").sequence(0).tolist() == tokenizer.encode("some text")


@pytest.mark.parametrize(("paragraphs", "expected"), [(False, ["a\nb\n\n \nc\n"]), (True, ["a\nb\n", "c\n"])])
def test_a_txt_file_is_one_document_or_one_per_paragraph(
    tmp_path: Path, tokenizer_config, tokenizer, paragraphs: bool, expected: list[str]
):
    (tmp_path / "in.txt").write_text("a\nb\n\n \nc\n")
    prepare([tmp_path / "in.txt"], tmp_path / "out", tokenizer_config, paragraphs=paragraphs)
    index = read_index(tmp_path / "out")
    assert [tokenizer.decode(index.sequence(n)[:-1].tolist()) for n in range(index.documents)] == expected


def test_empty_documents_are_left_out_and_counted(tmp_path: Path, tokenizer_config, write_jsonl):
    path = write_jsonl(tmp_path / "in.jsonl", ["a", "", "b", ""])
    sidecar = prepare([path], tmp_path / "out", tokenizer_config)
    assert (sidecar.documents, sidecar.empty_documents) == (2, 2)


BAD_LINES = {
    b'{"text": "cut off': "2: not JSON",
    b'["text"]': "2: is a JSON list",
    b'{"content": "x", "id": 1}': r"2: no text under the key 'text'; keys here: 'content', 'id'",
    b'{"text": 3}': "2: no text under the key 'text'",
    b'{"text": "caf\xe9"}': "2: not UTF-8 .byte 0xe9",
    b'{"text": "\\ud800"}': "2: holds half of a surrogate pair",
}


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_bad_line_is_named_and_nothing_is_left(tmp_path: Path, tokenizer_config, workers: int):
    path = tmp_path / "in.jsonl"
    bad = next(iter(BAD_LINES)) if workers == 2 else b'{"text": 3}'
    path.write_bytes(b'{"text": "good"}\n' + bad + b"\n" + b"worse\n")
    with pytest.raises(DataError, match=f"in.jsonl:{BAD_LINES[bad]}"):
        prepare([path], tmp_path / "out", tokenizer_config, workers)
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_every_kind_of_bad_line_is_named(tmp_path: Path, line: bytes):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=f"in.jsonl:{BAD_LINES[line]}"):
        list(documents.read_texts([path]))


def test_a_txt_file_in_another_encoding_is_refused(tmp_path: Path):
    (tmp_path / "in.txt").write_bytes("text".encode("utf-16"))
    with pytest.raises(DataError, match=r"in\.txt:1: not UTF-8 \(byte 0xff at offset 0"):
        list(documents.read_texts([tmp_path / "in.txt"]))


@pytest.mark.parametrize("suffix", ["bin", "idx", "json"])
def test_existing_outputs_are_never_overwritten(tmp_path: Path, tokenizer_config, suffix: str, write_jsonl):
    (tmp_path / f"out.{suffix}").write_text("precious")
    with pytest.raises(DataError, match=rf"refusing to overwrite .*out\.{suffix}"):
        prepare([write_jsonl(tmp_path / "in.jsonl", ["a"])], tmp_path / "out", tokenizer_config)
    assert (tmp_path / f"out.{suffix}").read_text() == "precious"
    assert len(list(tmp_path.iterdir())) == 2


def test_inputs_that_are_absent_unknown_or_without_text_are_refused(tmp_path: Path, tokenizer_config, write_jsonl):
    (tmp_path / "in.csv").write_text("a,b")
    for inputs, message in (
        ([], "no input given"),
        ([tmp_path / "no.jsonl"], r"no\.jsonl: no such file"),
        ([tmp_path / "in.csv"], r"in\.csv: unknown kind '\.csv'; legal: \.jsonl, \.txt"),
        ([write_jsonl(tmp_path / "in.jsonl", ["", ""])], "hold no text"),
    ):
        with pytest.raises(DataError, match=message):
            prepare(inputs, tmp_path / "out", tokenizer_config)
    assert not list(tmp_path.glob("out*"))


def test_a_run_killed_in_the_middle_leaves_nothing_that_looks_whole(
    tmp_path: Path, tokenizer_config, source_texts, write_jsonl
):
    os.mkfifo(tmp_path / "in.jsonl")  # an input that goes on for as long as the test wants
    inputs = [write_jsonl(tmp_path / "first.jsonl", source_texts(100)), tmp_path / "in.jsonl"]
    arguments = (inputs, tmp_path, tokenizer_config)
    child = multiprocessing.get_context("fork").Process(target=_prepare_from_pipe, args=arguments)
    child.start()
    with (tmp_path / "in.jsonl").open("wb") as pipe:
        for text in source_texts(8000):
            pipe.write(json.dumps({"text": text}).encode() + b"\n")
        pipe.flush()
        _wait_for(lambda: any(draft.stat().st_size for draft in tmp_path.glob(".*.partial/out.bin")))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    assert child.exitcode == -signal.SIGKILL
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(DataError, match=r"out\.idx is missing"):
        verify_prefix(tmp_path / "out")
    prepare(inputs[:1], tmp_path / "out", tokenizer_config)  # the leftovers do not stand in the way
    verify_prefix(tmp_path / "out")


def _prepare_from_pipe(inputs: list[Path], folder: Path, config: TokenizerConfig) -> None:
    Path.is_file = Path.exists  # a pipe is not a regular file
    prepare(inputs, folder / "out", config)


def _wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.02)


def test_encoding_processes_end_when_their_parent_is_killed(tmp_path: Path, tokenizer_config, tokenizer):
    job = encode.EncodeJob(tokenizer_config, tokenizer.fingerprint, True, "text", "uint16")
    parent = multiprocessing.get_context("fork").Process(target=_encode_for_ever, args=(job, tmp_path / "started"))
    parent.start()
    _wait_for((tmp_path / "started").exists)
    children = [int(pid) for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]
    assert len(children) >= 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    _wait_for(lambda: not any(_alive(pid) for pid in children))


def _encode_for_ever(job: encode.EncodeJob, started: Path) -> None:
    block = documents.Block("in.txt", False, ((1, b"text"),))
    for _ in encode.encode_blocks(job, iter(lambda: block, None), workers=2):
        started.touch()


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_tokenizer_that_changes_during_the_run_is_noticed(tokenizer_config):
    job = encode.EncodeJob(tokenizer_config, "0" * 64, True, "text", "uint16")
    with pytest.raises(DataError, match="changed while"):
        list(encode.encode_blocks(job, [documents.Block("in.txt", False, ((1, b"text"),))], 1))
