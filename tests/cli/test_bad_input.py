"""What a user can get wrong, through the real command line: one clear error, exit code 2, and nothing touched."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

import pytest
import yaml

from moetrain.errors import CheckpointError
from moetrain.testing import run_cli
from moetrain.train.ownership import sole_run

TRAIN = ("train", "run.yaml")


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file ("" for a folder), but for the logs and the index cache, which only ever grow."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
        if not {"logs", "data-cache"} & set(path.parts)
    }


def refusal(folder: Path, *words: str, environment: Mapping[str, str] | None = None) -> str:
    """The error of a command that is refused as it should be."""
    before = contents(folder)
    result = run_cli(words, folder, environment)
    assert result.code == 2, result
    assert result.stderr.count("error: ") == 1, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert contents(folder) == before
    return result.stderr.partition("error: ")[2]


# --- configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.hiden_size=64", ["model.hiden_size: unknown setting; did you mean model.hidden_size?"]),
        ("training.train_iters=many", ['training.train_iters: "many" must be a whole number']),
        ("data.split='inf,1,1'", ['data.split: "inf,1,1" must be three non-negative numbers', "all finite"]),
        ("parallel.expert=3", ["parallel.expert (3) must divide model.moe.num_experts (4); legal: 1, 2, 4"]),
        ("zero.stage=3", ["zero.stage (3) is refused by DeepSpeed for models with experts", "legal: 0, 1, 2"]),
        (
            "model.moe.router={type: da_moe, importance: col_max}",
            [
                "moe.router.importance (col_max) looks at later tokens, so in a causal model the routing of a token "
                "would leak its future; legal here: self_weight, row_max, row_entropy",
            ],
        ),
        (
            "deepspeed={zero_optimization: {stage: 2}}",
            ["deepspeed.zero_optimization.stage: 2 contradicts zero.stage; set that instead"],
        ),
        (
            "optimizer.schedule={type: constant, decay_iters: 1}",
            ["decay_iters (1) means nothing with type constant", "wsd, cosine or linear"],
        ),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_its_rule_and_its_place(
    folder: Path, override: str, words: list[str]
) -> None:
    text = refusal(folder, *TRAIN, override)
    assert text.startswith("1 problem in the configuration:\n")
    for each in words:
        assert each in text
    assert f"override {override!r}" in text


def test_a_wrong_setting_in_a_file_is_named_with_file_and_line(folder: Path) -> None:
    (folder / "more.yaml").write_text("training:\n  global_batch_size: 0\n")
    text = refusal(folder, *TRAIN, "more.yaml")
    assert "training.global_batch_size: 0 must be greater" in text
    assert "[more.yaml:2:3]" in text


def test_all_that_is_wrong_is_told_at_once(folder: Path) -> None:
    text = refusal(folder, *TRAIN, "zero.stag=1", "optimizer.lr=-1", "training.train_iters=0")
    assert text.startswith("3 problems in the configuration:\n")
    assert len(text.strip().splitlines()) == 4
    for setting in ("zero.stag:", "optimizer.lr:", "training.train_iters:"):
        assert f"\n  {setting}" in text


def test_zero_3_on_a_pipeline_is_refused_with_the_reason(folder: Path) -> None:
    text = refusal(folder, *TRAIN, "model.moe=null", "zero.stage=3", "parallel.pipeline=2")
    assert "zero.stage (3) with parallel.pipeline (2) hangs in DeepSpeed" in text and "legal: 0, 1, 2" in text


@pytest.mark.parametrize("words", [("config", "check", "run.yaml", "-n", "3"), TRAIN])
def test_sizes_that_do_not_fit_the_processes_are_refused_with_the_nearest_that_do(
    folder: Path, words: tuple[str, ...]
) -> None:
    text = refusal(folder, *words, "parallel.tensor=2", "training.global_batch_size=6")
    world = 3 if "-n" in words else 1
    assert f"parallel.tensor x parallel.pipeline (2 x 1 = 2) must divide the world size ({world})" in text
    assert "nearest that fit: parallel.tensor=1 parallel.pipeline=1 parallel.expert=1" in text


def test_cuda_on_a_machine_without_it_is_refused(folder: Path) -> None:
    text = refusal(folder, *TRAIN, "runtime.device=cuda", environment={"CUDA_VISIBLE_DEVICES": ""})
    assert "runtime.device is cuda, but torch" in text and "legal here: auto, cpu" in text


@pytest.mark.parametrize(
    "words",
    [
        (*TRAIN, "data.cache_dir=cache"),
        ("launch", "local", "run.yaml"),
        ("launch", "slurm", "--processes-per-node", "1", "--submit", "run.yaml"),
    ],
    ids=["train", "local", "slurm"],
)
def test_a_run_folder_that_cannot_be_written_is_refused(folder: Path, words: tuple[str, ...]) -> None:
    (folder / "file").touch()
    (folder / "cache").mkdir()
    (folder / "sbatch").touch(mode=0o755)
    text = refusal(folder, *words, "run.dir=file/run", environment={"PATH": f"{folder}:{os.environ['PATH']}"})
    assert text.startswith("run.dir ") and "file/run: cannot write" in text and "(Not a directory)" in text


# --- data -----------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    """Half a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "small.bin").unlink(), "corpus small: small.bin is missing"),
        (lambda folder: (folder / "small.idx").unlink(), "corpus small: small.idx is missing"),
        (lambda folder: truncate(folder / "small.bin"), "truncated, or not from the same run"),
        (lambda folder: truncate(folder / "small.idx"), "corpus small: small.idx is truncated"),
        (lambda folder: truncate(folder / "small.model"), "tokenizer small.model: not a sentencepiece model"),
        (lambda folder: (folder / "small.model").unlink(), "tokenizer small.model: no such file"),
    ],
    ids=["no-bin", "no-idx", "half-bin", "half-idx", "half-tokenizer", "no-tokenizer"],
)
def test_a_damaged_corpus_is_refused_before_anything_is_written(
    folder: Path, damage: Callable[[Path], object], words: str
) -> None:
    shutil.rmtree(folder / "run")
    damage(folder)
    assert words in refusal(folder, *TRAIN)
    assert not (folder / "run").exists()


def test_a_tokenizer_that_did_not_make_the_corpus_is_refused(folder: Path) -> None:
    text = refusal(folder, *TRAIN, "data.tokenizer.path=other.model")
    assert "corpus small: was made with tokenizer" in text
    assert "(vocabulary 360)" in text and "(vocabulary 370)" in text


def test_a_vocabulary_larger_than_the_embedding_is_refused(folder: Path) -> None:
    text = refusal(folder, *TRAIN, "model.vocab_size=256")
    assert "model.vocab_size (256) must be at least data.tokenizer's vocabulary (360)" in text


def test_a_corpus_too_small_for_one_sequence_is_refused(folder: Path) -> None:
    text = refusal(folder, *TRAIN, "model.seq_length=1000000")
    assert "corpus small: its train share" in text and "model.seq_length + 1 = 1000001" in text


@pytest.mark.parametrize(
    ("command", "taken"),
    [
        ("data prepare text.jsonl --output small --tokenizer other.model --quiet", "small.bin"),
        ("data tokenizer text.jsonl --output small --vocab-size 350", "small.model"),
        ("data corpus text.jsonl --max-bytes 1000 --quiet", "text.jsonl"),
    ],
)
def test_existing_data_is_never_overwritten(folder: Path, command: str, taken: str) -> None:
    text = refusal(folder, *command.split())
    assert "refusing to overwrite" in text and taken in text


def test_ranks_that_refuse_together_give_one_error_and_no_torchrun_report(folder: Path) -> None:
    truncate(folder / "small.bin")
    text = refusal(folder, "launch", "local", "-n", "2", "run.yaml")
    assert "truncated, or not from the same run" in text
    assert len(text.strip().splitlines()) == 1


# --- checkpoints ----------------------------------------------------------------------------------------------------


def shard_of(folder: Path, step: int) -> Path:
    """The only shard of a step's checkpoint."""
    (shard,) = (folder / "run" / "checkpoints" / f"step-{step:08d}").glob("shard-*.safetensors")
    return shard


def flip(path: Path) -> None:
    """One bit, in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = pytest.mark.parametrize(
    ("damage", "reason"),
    [(Path.unlink, "missing; the manifest says"), (truncate, "bytes; the manifest says"), (flip, "damaged: sha256 is")],
    ids=["no-shard", "half-shard", "flipped-bit"],
)


@DAMAGES
def test_a_damaged_only_checkpoint_is_refused(folder: Path, damage: Callable[[Path], object], reason: str) -> None:
    shutil.rmtree(shard_of(folder, 1).parent)
    damage(shard_of(folder, 2))
    text = refusal(folder, *TRAIN, "training.train_iters=3")
    assert "no usable checkpoint" in text and reason in text and "step-00000002" in text


@DAMAGES
def test_a_damaged_newest_checkpoint_is_passed_over_for_a_sound_one(
    folder: Path, damage: Callable[[Path], object], reason: str
) -> None:
    damage(shard_of(folder, 2))
    result = run_cli([*TRAIN, "training.train_iters=3"], folder)
    assert result.code == 0, result
    assert "passed over a damaged checkpoint, using step-00000001 instead" in result.stderr
    assert reason in result.stderr
    assert (folder / "run" / "checkpoints" / "latest").read_text() == "step-00000003\n"


def test_a_model_that_contradicts_the_checkpoint_is_refused(folder: Path) -> None:
    text = refusal(folder, *TRAIN, "model.hidden_size=64", "training.train_iters=3")
    assert "the checkpoint belongs to another model" in text
    assert "model.hidden_size: 32 in the checkpoint, 64 in this run" in text
    assert yaml.safe_load((folder / "run" / "config.yaml").read_text())["model"]["hidden_size"] == 32


def test_a_tokenizer_that_contradicts_the_checkpoint_is_refused(folder: Path) -> None:
    changes = ("data.tokenizer.path=other.model", "data.train=[{path: other}]", "training.train_iters=3")
    text = refusal(folder, *TRAIN, *changes)
    assert "the checkpoint belongs to another model" in text and "tokenizer fingerprint" in text


def test_a_corpus_that_was_exchanged_under_its_path_is_told_at_resume(folder: Path) -> None:
    told = run_cli([*TRAIN, "training.train_iters=3"], folder).stderr
    assert "resumed from" in told and "resume: corpus" not in told
    for suffix in ("bin", "idx", "json"):
        (folder / f"small.{suffix}").unlink()
    lines = (folder / "text.jsonl").read_text().splitlines(keepends=True)
    (folder / "text.jsonl").write_text("".join(reversed(lines)))
    command = ("data", "prepare", "text.jsonl", "--output", "small", "--tokenizer", "small.model", "--quiet")
    assert run_cli(command, folder).code == 0
    result = run_cli([*TRAIN, "training.train_iters=4"], folder)
    assert result.code == 0, result
    assert "resume: corpus small: 19 documents" in result.stderr


def test_a_fresh_start_in_a_folder_with_checkpoints_is_refused(folder: Path) -> None:
    text = refusal(folder, *TRAIN, "checkpoint.resume=never")
    assert "checkpoint.resume is never" in text and "step-00000002" in text and "choose another run.dir" in text


@pytest.mark.parametrize("path", ["nowhere", "empty"])
def test_loading_from_where_no_checkpoint_is_is_refused(folder: Path, path: str) -> None:
    (folder / "empty" / "checkpoints").mkdir(parents=True)
    text = refusal(folder, *TRAIN, "run.dir=new", f"checkpoint.load={path}")
    assert f"checkpoint.load: {path} is no checkpoint: expected a step folder" in text and "a run folder" in text


def test_where_a_run_began_is_not_needed_once_it_has_checkpoints_of_its_own(folder: Path) -> None:
    result = run_cli([*TRAIN, "checkpoint.load=nowhere", "training.train_iters=3"], folder)
    assert result.code == 0, result
    assert "resumed from run/checkpoints/step-00000002" in result.stderr


@pytest.mark.parametrize("path", ["run", "run/checkpoints", "run/checkpoints/step-00000002"])
def test_a_run_may_start_from_another_runs_folder(folder: Path, path: str) -> None:
    result = run_cli([*TRAIN, "run.dir=new", f"checkpoint.load={path}", "training.train_iters=3"], folder)
    assert result.code == 0, result
    assert "resumed from run/checkpoints/step-00000002" in result.stderr
    assert (folder / "new" / "checkpoints" / "latest").read_text() == "step-00000003\n"


@pytest.mark.parametrize(("source", "words"), [("run", "out"), ("nowhere", "nowhere is no checkpoint")])
def test_an_export_neither_overwrites_nor_invents(folder: Path, source: str, words: str) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "mine.txt").write_text("precious")
    assert words in refusal(folder, "convert", "to-hf", source, "out")


# --- two runs in one folder -----------------------------------------------------------------------------------------


def test_a_folder_in_which_a_run_is_going_on_is_refused(folder: Path) -> None:
    with (folder / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run = sole_run(folder / "run", logging.getLogger("test"), patience=0.1)
        with pytest.raises(CheckpointError, match="another run is going on in this folder"), run:
            pass


def test_a_run_waits_for_the_one_before_and_then_resumes_what_that_saved(folder: Path) -> None:
    lock = (folder / "run" / ".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    end = threading.Thread(target=release_when_waited_for, args=(lock, folder / "run" / "logs" / "rank-0.log"))
    end.start()
    result = run_cli([*TRAIN, "training.train_iters=3"], folder)
    end.join()
    assert result.code == 0, result
    said = result.stderr
    assert said.index("another run is going on in run; waiting up to 120 s") < said.index("resumed from run")


def release_when_waited_for(lock: TextIO, log: Path) -> None:
    deadline = time.monotonic() + 60
    while "another run is going on" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    lock.close()


# --- the end of a run -----------------------------------------------------------------------------------------------


def test_a_request_to_stop_that_came_before_the_ranks_were_ready_is_obeyed(folder: Path) -> None:
    for launched, latest in (("1", "step-00000003\n"), ("", "step-00000004\n")):
        (folder / "run" / "stop-requested").write_text("time is up")
        result = run_cli([*TRAIN, "training.train_iters=4"], folder, {"MOETRAIN_LAUNCHED": launched})
        assert result.code == 0, result
        assert ("stopping after iteration 3: time is up" in result.stderr) == bool(launched)
        assert (folder / "run" / "checkpoints" / "latest").read_text() == latest
        assert not (folder / "run" / "stop-requested").exists()


def test_what_ended_a_run_is_told_even_if_its_summary_cannot_be_written(folder: Path) -> None:
    (folder / "run" / ".summary.json.tmp").mkdir()
    with (folder / "run" / "checkpoints" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = run_cli([*TRAIN, "training.train_iters=3"], folder)
    assert result.code == 2, result
    assert "SummaryCallback, told of the error, failed itself" in result.stderr
    assert "another process is saving here" in result.stderr.partition("error: ")[2]
    assert "Traceback" not in result.stderr


def test_a_run_that_diverged_says_since_when_no_weight_has_changed(folder: Path) -> None:
    result = run_cli([*TRAIN, "training.train_iters=9", "optimizer.lr=1e38", "training.max_skipped_steps=2"], folder)
    assert result.code == 2, result
    assert "2 steps in a row had non-finite gradients" in result.stderr
    assert "no weight has changed since iteration 3. Lower optimizer.lr" in result.stderr


def test_a_run_that_is_beyond_its_end_says_so(folder: Path) -> None:
    result = run_cli([*TRAIN, "training.train_iters=9", "training.stop_after=1"], folder)
    assert result.code == 0, result
    assert "nothing to train: the run is at iteration 2 and was to end at 1" in result.stderr
