"""What the stages of the demo do. The functions that need Megatron or transformers are called in a `Worker`."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from typing import Any, ParamSpec, Self, TypeVar

import psutil
import typer

from moetrain.cli.demo_plan import HELD_OUT_FRACTION, TOKENIZER_SAMPLE_BYTES, Files
from moetrain.errors import MoetrainError
from moetrain.runtime.preemption import exit_with_parent

PROMPTS = ("import os\nimport sys\n", "def __init__(self, ", "    Return ")
_NEW_TOKENS = 48
_POLL_SECONDS = 0.2

P = ParamSpec("P")
T = TypeVar("T")


class Worker:
    """One further process, started when first needed, for what would make this one heavy: while the model trains, the
    demo itself is only waiting. One process for all of it, because importing Megatron takes seconds."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`function(*args)` over there; its exception is raised here."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_become_worker)
        try:
            return self._pool.submit(function, *args, **kwargs).result()
        except BrokenProcessPool:
            raise MoetrainError(
                f"the process of the stage ({function.__name__}) died, perhaps for want of memory"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _become_worker() -> None:
    from moetrain.runtime.logs import quiet_imports

    exit_with_parent()
    os.environ["OMP_NUM_THREADS"] = "1"  # its matrices are small: more threads mostly wait for one another
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a second traceback
    quiet_imports()


# --- data -----------------------------------------------------------------------------------------------------------


def make_corpus(files: Files, max_bytes: int) -> dict[str, Any]:
    """This Python's own sources and documentation; which documents are held out depends on their hash alone."""
    from moetrain.data.corpus import standard_library_corpus

    report = standard_library_corpus(files.corpus, max_bytes, files.held_out, HELD_OUT_FRACTION, show_progress=True)
    return {"documents": report.documents, "held_out_documents": report.held_out_documents}


def make_tokenizer(files: Files, vocab_size: int) -> dict[str, Any]:
    """Trained on a sample of the training share: a tokenizer that has seen the held-out text would flatter the loss."""
    from moetrain.data.documents import check_inputs, read_texts, sample_texts
    from moetrain.data.train_tokenizer import train_sentencepiece

    share = TOKENIZER_SAMPLE_BYTES / check_inputs([files.corpus])
    texts = sample_texts(read_texts([files.corpus]), share)
    trained = train_sentencepiece(texts, files.tokenizer.with_suffix(""), vocab_size)
    return {"pieces": trained.vocab_size}


def encode(files: Files) -> dict[str, Any]:
    """Both shares in Megatron's format. Called in a `Worker`."""
    from moetrain.config.schema import TokenizerConfig
    from moetrain.data.prepare import prepare

    tokenizer = TokenizerConfig(type="sentencepiece", path=str(files.tokenizer))
    train = prepare([files.corpus], files.train, tokenizer, show_progress=True)
    valid = prepare([files.held_out], files.valid, tokenizer, show_progress=True)
    return {"train_tokens": train.tokens, "valid_tokens": valid.tokens}


# --- training -------------------------------------------------------------------------------------------------------


def train_and_kill(files: Files, processes: int, kill_at: int) -> dict[str, Any]:
    """Train until a step from `kill_at` on, past a checkpoint, is logged; then SIGKILL every process of the launch."""
    started = time.time()
    launched = _launch(files, processes, [])
    while (reached := _logged_step(files, started)) < kill_at or not 0 < _saved_step(files) < reached:
        if launched.returncode is not None:
            _refuse_failure(launched.returncode)
            raise MoetrainError(f"the run ended by itself after step {reached}: call again to go on, or with --fresh")
        _wait(launched, _POLL_SECONDS)
    killed, checkpoint = _kill_tree(launched), _saved_step(files)
    typer.echo(f"killed {killed} processes after step {reached}; the newest checkpoint is of step {checkpoint}")
    figures = _training_figures(files, first_step=1)
    return {"killed_at": reached, "killed_processes": killed, "checkpoint": checkpoint, **figures}


def resume(files: Files, processes: int, layout: Sequence[str], not_before: int) -> dict[str, Any]:
    """Go on from the newest checkpoint, on another layout, to the end."""
    launched = _launch(files, processes, layout)
    _wait(launched)
    _refuse_failure(launched.returncode)
    summary = json.loads((files.run / "summary.json").read_text(encoding="utf-8"))
    if summary["outcome"] != "finished":
        raise MoetrainError(f"the run was stopped after step {summary['iteration']}; call again to go on")
    started = summary["start_iteration"]
    if started < not_before:
        raise MoetrainError(f"the run started at step {started}, not from the checkpoint of step {not_before}")
    return {"resumed_at": started, **_training_figures(files, first_step=started + 1)}


def _launch(files: Files, processes: int, overrides: Sequence[str]) -> subprocess.Popen[bytes]:
    command = ["launch", "local", "-n", str(processes), str(files.config), *overrides]
    typer.echo(f"$ moetrain {' '.join(command)}")
    return subprocess.Popen(
        [sys.executable, "-m", "moetrain", *command],
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # a terminal's Ctrl-C reaches us alone, and is passed on once
        preexec_fn=partial(exit_with_parent, signal.SIGTERM),
    )


def _wait(launched: subprocess.Popen[bytes], seconds: float | None = None) -> None:
    """Until it ends, or so long. On Ctrl-C the launcher has the run saved before it leaves; a second one kills it."""
    try:
        launched.wait(seconds)
    except subprocess.TimeoutExpired:
        pass
    except KeyboardInterrupt:
        launched.send_signal(signal.SIGINT)
        launched.wait()
        raise


def _refuse_failure(code: int) -> None:
    """Leave with the launcher's exit code, which has said why, unless it is 0."""
    if code:
        raise typer.Exit(code if code > 0 else 128 - code)


def _kill_tree(launched: subprocess.Popen[bytes]) -> int:
    """SIGKILL to the launcher, torchrun and all ranks, which have sessions of their own. Returns their number."""
    root = psutil.Process(launched.pid)
    tree = [root, *root.children(recursive=True)]
    for process in tree:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue  # its parent's death was faster
    launched.wait()
    alive = psutil.wait_procs(tree, timeout=30)[1]
    assert not alive, f"SIGKILL left {alive}"
    return len(tree)


def _logged_step(files: Files, since: float) -> int:
    """The last step in metrics.jsonl; 0 while the file is an earlier process's, from before the time `since`."""
    steps = metric_rows(files, "train")
    return steps[-1]["iteration"] if steps and files.metrics.stat().st_mtime >= since else 0


def _saved_step(files: Files) -> int:
    """The step of the newest committed checkpoint; 0 without one."""
    name = files.latest.read_text(encoding="ascii") if files.latest.is_file() else "step-0"
    return int(name.strip().removeprefix("step-"))


def metric_rows(files: Files, kind: str) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl of one kind ("train" or "eval"), without a last one that is being written."""
    text = files.metrics.read_text(encoding="utf-8") if files.metrics.is_file() else ""
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [row for row in rows if row["kind"] == kind]


def _training_figures(files: Files, first_step: int) -> dict[str, Any]:
    """Pace and balance of the steps from `first_step` on."""
    rows = [row for row in metric_rows(files, "train") if row["iteration"] >= first_step]
    loads = [value for name, value in rows[-1].items() if name.endswith("/max_over_mean")]
    seconds = math.fsum(row["train/step_seconds"] for row in rows[1:] or rows)
    return {
        "tokens_per_second": math.fsum(row["train/tokens"] for row in rows[1:] or rows) / seconds,
        "first_loss": rows[0]["train/loss"],
        "last_loss": rows[-1]["train/loss"],
        "mean_k": rows[-1].get("train/mean_k"),
        "max_over_mean_load": max(loads, default=None),
    }


# --- export (all called in a `Worker`) ------------------------------------------------------------------------------


def export(files: Files) -> dict[str, Any]:
    """The newest checkpoint as a Hugging Face folder."""
    from moetrain.checkpoint import CheckpointReader, find_step_folder
    from moetrain.convert.hf import export_hf

    with CheckpointReader(find_step_folder(files.run)) as reader:
        report = export_hf(reader, files.hf, announce=typer.echo)
    return {"parameters": report.parameters, "step": report.step}


def compare_logits(files: Files) -> dict[str, Any]:
    """The largest difference between the training model's logits and those of transformers."""
    from moetrain.checkpoint import CheckpointReader, find_step_folder
    from moetrain.convert.verify import verify_export

    with CheckpointReader(find_step_folder(files.run)) as reader:
        report = verify_export(reader, files.hf, tolerance=math.inf)  # the demo judges, after its summary
    typer.echo(f"largest difference of a logit: {report.max_abs:.2g} at {report.positions} positions")
    return {"max_abs": report.max_abs, "positions": report.positions, "argmax_agreement": report.argmax_agreement}


def generate(files: Files) -> dict[str, Any]:
    """What transformers alone makes of the exported folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trusted: dict[str, Any] = {"trust_remote_code": True, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(files.hf, **trusted)
    model: Any = AutoModelForCausalLM.from_pretrained(files.hf, **trusted).eval()
    torch.manual_seed(0)
    samples = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        room = min(_NEW_TOKENS, model.config.max_position_embeddings - inputs["input_ids"].shape[1])
        ids = model.generate(**inputs, max_new_tokens=room, do_sample=True, temperature=0.7, top_k=40)
        text = tokenizer.decode(ids[0], skip_special_tokens=True)
        samples.append({"prompt": prompt, "text": text})
        typer.echo(f"--- {prompt!r}\n{text}")
    return {"samples": samples}
