"""What the demo says at its end, and whether that is good enough."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moetrain.cli.demo_folder import DemoFolder
from moetrain.cli.demo_plan import SECOND_LAYOUT, Plan
from moetrain.cli.demo_stages import metric_rows

LOGITS_TOLERANCE = 1e-4


def problems(folder: DemoFolder, plan: Plan, quality_gate: bool) -> list[str]:
    """One sentence for each claim of the demo that did not come true."""
    found = []
    evaluation = metric_rows(plan.files, "eval")[-1]
    loss, entropy = evaluation["eval/loss"], evaluation["eval/unigram_entropy"]
    if quality_gate and not loss < entropy:
        found.append(
            f"the held-out loss ({loss:.3f}) is not below the unigram entropy of the same text ({entropy:.3f}): "
            "the model has not learned to use context"
        )
    difference = folder.records["logits"].result["max_abs"]
    if not difference <= LOGITS_TOLERANCE:
        found.append(
            f"transformers' logits differ from the training model's by {difference:.2g}; tolerance {LOGITS_TOLERANCE:g}"
        )
    return found


def summary_lines(folder: DemoFolder, plan: Plan) -> list[str]:
    """The closing screen."""
    results = {name: record.result for name, record in folder.records.items()}
    seconds = {name: record.seconds for name, record in folder.records.items()}
    return [
        "",
        "Summary",
        *_table(_learned(plan, results)),
        "",
        *_table(_happened(plan, results)),
        "",
        "Seconds: "
        + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
        + f"; {sum(seconds.values()):.0f} in all",
        "",
        "Where everything lies",
        *_table(_places(plan)),
        "",
        "Next",
        *(f"  {command}" for command in _next_commands(plan)),
    ]


def _table(rows: Iterator[tuple[str, str]]) -> list[str]:
    listed = list(rows)
    width = max(len(name) for name, _ in listed)
    return [f"  {name:<{width}}  {text}" for name, text in listed]


def _learned(plan: Plan, results: dict[str, Any]) -> Iterator[tuple[str, str]]:
    steps, evaluations = metric_rows(plan.files, "train"), metric_rows(plan.files, "eval")
    first, last = steps[0], steps[-1]
    loss, entropy = evaluations[-1]["eval/loss"], evaluations[-1]["eval/unigram_entropy"]
    course = ", ".join(f"{row['eval/loss']:.3f} at step {row['iteration']}" for row in evaluations)
    gap = f"{abs(entropy - loss):.3f} {'below' if loss < entropy else 'ABOVE'} it"
    yield "loss at first", f"{first['train/loss']:.3f} nats per token at step {first['iteration']}"
    yield "loss at last", f"{last['train/loss']:.3f} at step {last['iteration']}"
    yield "tokens seen", f"{last['train/consumed_tokens']:,}"
    yield "held-out loss", f"{loss:.3f} ({course})"
    yield "unigram entropy", f"{entropy:.3f} of the same held-out text; the held-out loss is {gap}"
    yield "experts per token", f"{last['train/mean_k']:.2f} on average" if "train/mean_k" in last else "none"
    yield "busiest expert", f"{results['resume']['max_over_mean_load']:.2f} x the mean load, in the worst layer"


def _happened(plan: Plan, results: dict[str, Any]) -> Iterator[tuple[str, str]]:
    train, resumed, logits = results["train"], results["resume"], results["logits"]
    yield "first layout", f"{plan.describe_layout(plan.first)}, {train['tokens_per_second']:,.0f} tokens/s"
    yield "killed", f"{train['killed_processes']} processes by SIGKILL after step {train['killed_at']}"
    yield "resumed", f"from the sharded checkpoint of step {resumed['resumed_at']}"
    yield "second layout", f"{plan.describe_layout(plan.second)}, {resumed['tokens_per_second']:,.0f} tokens/s"
    accuracy = f"{logits['max_abs']:.2g} at {logits['positions']} positions (allowed: {LOGITS_TOLERANCE:g})"
    yield "transformers", f"largest difference of a logit {accuracy}"


def _places(plan: Plan) -> Iterator[tuple[str, str]]:
    files = plan.files
    yield "corpus", f"{files.corpus}, held out: {files.held_out}"
    yield "tokenizer", f"{files.tokenizer}"
    yield "data", f"{files.train}.bin/.idx, {files.valid}.bin/.idx"
    yield "run", f"{files.run}: metrics.jsonl, summary.json, logs/"
    yield "TensorBoard", f"{files.run / 'tensorboard'}"
    yield "checkpoints", f"{files.latest.parent}"
    yield "Hugging Face", f"{files.hf}"


def _next_commands(plan: Plan) -> Iterator[str]:
    """With this very interpreter, because its environment need not be active in the reader's shell."""
    files, here, program = plan.files, Path.cwd(), Path(sys.executable)
    python = str(program.relative_to(here) if program.is_relative_to(here) else program)
    moetrain = (python, "-m", "moetrain")
    double = f"training.train_iters={2 * plan.first.training.train_iters}"
    yield shlex.join([python, "-m", "tensorboard.main", "--logdir", str(files.run / "tensorboard")])
    yield shlex.join([*moetrain, "config", "check", str(files.config), *SECOND_LAYOUT, "-n", str(plan.processes)])
    yield shlex.join([*moetrain, "data", "inspect", str(files.valid), "--tokenizer", str(files.tokenizer)])
    yield shlex.join([*moetrain, "launch", "local", "-n", "2", str(files.config), "parallel.pipeline=1", double])
    yield shlex.join([*moetrain, "convert", "to-hf", str(files.run), f"{files.hf}-bf16", "--dtype", "bfloat16"])
