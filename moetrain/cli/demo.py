"""`moetrain demo`: from text to an exported model, with a crash and another layout on the way."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from moetrain.cli import demo_stages as work
from moetrain.cli.demo_folder import DemoFolder, Record, Stage, open_folder
from moetrain.cli.demo_plan import SECOND_LAYOUT, Plan, make_plan
from moetrain.cli.demo_summary import problems, summary_lines
from moetrain.config.loader import dump_yaml

app = typer.Typer(add_completion=False)

_DEFAULT_CONFIG = Path(__file__).parents[2] / "configs" / "demo.yaml"


@app.command()
def demo(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE...]", help="settings of the training run, such as optimizer.lr=1e-3"),
    ] = None,
    directory: Annotated[Path, typer.Option("--dir", help="where everything goes")] = Path("runs/demo"),
    processes: Annotated[int, typer.Option("--processes", "-n", min=1, help="ranks, in both layouts")] = 4,
    iters: Annotated[
        int | None, typer.Option(min=8, help="training steps; whatever else counts steps is scaled along")
    ] = None,
    corpus_bytes: Annotated[int, typer.Option(min=100_000, help="size of the corpus")] = 4_000_000,
    config: Annotated[Path, typer.Option(help="the training run's settings")] = _DEFAULT_CONFIG,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="first delete what an earlier demo left in --dir; refuses any other folder")
    ] = False,
    quality_gate: Annotated[
        bool, typer.Option(help="fail unless the held-out loss is below the unigram entropy")
    ] = True,
) -> None:
    """Train a small HyperMoE + DA-MoE model here, kill it half-way, resume it on another layout, and export it.

    No network, no GPU; about five minutes on two cores. Called again, it goes on where it stopped. Leaves with 1 when
    the model has not learned (held-out loss not below the unigram entropy) or transformers gives other logits.
    """
    plan = make_plan(directory, config, overrides or [], iters, processes, corpus_bytes)
    files = plan.files
    # Nothing is looked up in a network, and the exported model's code is cached in the demo's folder, not in the home.
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_MODULES_CACHE": str(files.root.absolute() / "cache"),
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    with open_folder(directory, plan.settings, fresh) as folder, work.Worker() as worker:
        files.config.write_text(dump_yaml(plan.first), encoding="utf-8")
        stages = _stages(plan, folder, worker)
        folder.check_outputs(stages)
        _run(folder, stages)
        typer.echo("\n".join(summary_lines(folder, plan)))
        wrong = problems(folder, plan, quality_gate)
    for problem in wrong:
        typer.echo(f"FAILED: {problem}", err=True)
    raise typer.Exit(1 if wrong else 0)


def _stages(plan: Plan, folder: DemoFolder, worker: work.Worker) -> list[Stage]:
    files, vocab_size = plan.files, plan.first.model.vocab_size
    return [
        Stage(
            "corpus",
            "corpus: sources and documentation of the standard library",
            lambda: work.make_corpus(files, plan.corpus_bytes),
            (files.corpus, files.held_out),
        ),
        Stage(
            "tokenizer",
            f"SentencePiece tokenizer of {vocab_size} pieces",
            lambda: work.make_tokenizer(files, vocab_size),
            (files.tokenizer,),
        ),
        Stage("encode", "text to Megatron .bin/.idx", lambda: worker.call(work.encode, files), files.indexed),
        Stage(
            "train",
            f"pretrain on {plan.describe_layout(plan.first)}; SIGKILL to every process at step {plan.kill_at}",
            lambda: work.train_and_kill(files, plan.processes, plan.kill_at),
            (files.latest,),
            continues=True,
        ),
        Stage(
            "resume",
            f"resume on {plan.describe_layout(plan.second)}",
            lambda: work.resume(files, plan.processes, SECOND_LAYOUT, folder.records["train"].result["checkpoint"]),
            (files.latest,),
            continues=True,
        ),
        Stage("export", "checkpoint to a Hugging Face folder", lambda: worker.call(work.export, files), (files.hf,)),
        Stage("logits", "the same logits from transformers?", lambda: worker.call(work.compare_logits, files)),
        Stage("generate", "text from transformers", lambda: worker.call(work.generate, files)),
    ]


def _run(folder: DemoFolder, stages: Sequence[Stage]) -> None:
    """Do what is not done, in order; what a stage has finished stays, whatever becomes of the next."""
    started = time.monotonic()
    for number, stage in enumerate(stages, 1):
        begun = time.monotonic()
        title = f"\n[{number}/{len(stages)}, {begun - started:.0f} s] {stage.title}"
        done = folder.records.get(stage.name)
        if done is not None:
            typer.secho(f"{title}: done before, in {done.seconds:.0f} s", bold=True)
            continue
        typer.secho(title, bold=True)
        folder.clear_remains(stage)
        result = stage.run()
        folder.record(stage, Record(time.monotonic() - begun, result))
