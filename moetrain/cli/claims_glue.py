"""`moetrain claims glue`: fine-tune a pretrained model on GLUE's tasks and report their measures."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from moetrain.data.glue import GLUE, Converted, GlueTask, check_task, convert_part, find_tasks
from moetrain.errors import ConfigError, MoetrainError


@dataclass(frozen=True)
class Recipe:
    """How every task is trained; BERT's ranges are 2 to 4 epochs, batches of 16 or 32 and 2e-5 to 5e-5
    (arXiv 1810.04805, appendix A.3)."""

    epochs: float
    batch_size: int
    lr: float
    seq_length: int | None
    seed: int
    num_processes: int


@dataclass(frozen=True)
class Score:
    """What one part of a task gave."""

    task: str
    part: str
    scores: dict[str, float]
    examples: int
    train_examples: int
    skipped: int
    steps: int


def glue(
    model: Annotated[Path, typer.Option(help="checkpoint of a pretrained model: a step, `checkpoints` or run folder")],
    data: Annotated[Path, typer.Option(help="folder with GLUE's folders: CoLA, SST-2, MRPC ...")],
    out: Annotated[Path, typer.Option(help="runs, glue.md and glue.json; a second call goes on there")] = Path(
        "runs/glue"
    ),
    tasks: Annotated[list[str] | None, typer.Option("--task", help="only these; default: those in --data")] = None,
    epochs: Annotated[float, typer.Option(min=0.01, help="times through the training examples")] = 3.0,
    batch_size: Annotated[int, typer.Option(min=1, help="texts per step")] = 32,
    lr: Annotated[float, typer.Option(min=0.0, help="peak learning rate; a tenth of the steps warm up to it")] = 3e-5,
    seq_length: Annotated[int | None, typer.Option(min=4, help="tokens of a sample; default: the model's")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the head and the order of the texts")] = 1234,
    num_processes: Annotated[int, typer.Option("--num-processes", "-n", min=1, help="data-parallel ranks")] = 1,
) -> None:
    """Fine-tune on GLUE's tasks, one after another, and report what the held-out parts give."""
    recipe = Recipe(epochs, batch_size, lr, seq_length, seed, num_processes)
    chosen = _choose(data, tasks)
    for task in chosen:
        check_task(data, task)
    base = _pretrained(model)
    plans = [_plan(task, data, out, model, base, recipe) for task in chosen]
    scores = [score for task, plan in zip(chosen, plans, strict=True) for score in plan.run(task)]
    write_report(out, model, recipe, scores)
    typer.echo((out / "glue.md").read_text(encoding="utf-8"))


def _choose(data: Path, names: Sequence[str] | None) -> list[GlueTask]:
    if unknown := [name for name in names or [] if name not in GLUE]:
        raise ConfigError(f"--task ({', '.join(unknown)}) is no task of GLUE; legal: {', '.join(GLUE)}")
    found = find_tasks(data)
    if absent := [name for name in names or [] if name not in {task.name for task in found}]:
        raise ConfigError(f"--task ({', '.join(absent)}) has no folder in --data ({data})")
    return [task for task in found if not names or task.name in names]


def _pretrained(model: Path) -> dict[str, Any]:
    """The settings of the run that made the checkpoint."""
    from moetrain.checkpoint import CheckpointReader, find_step_folder

    with CheckpointReader(find_step_folder(model)) as reader:
        return dict(reader.config)


@dataclass(frozen=True)
class _Plan:
    """One task, checked and ready to train."""

    folder: Path
    config: Path
    train: Converted
    dev: dict[str, Converted]
    steps: int
    num_processes: int

    def run(self, task: GlueTask) -> list[Score]:
        """Train (or go on), then judge each held-out part: a finished run that is started again only validates."""
        scores = []
        for part, converted in self.dev.items():
            summary = self._launch(converted)
            kept = {name: summary["eval_scores"][name] for name in task.metrics}
            skipped = converted.skipped + self.train.skipped
            counts = converted.examples, self.train.examples, skipped, self.steps
            scores.append(Score(task.name, part, kept, *counts))
        return scores

    def _launch(self, valid: Converted) -> dict[str, Any]:
        from moetrain.launch.local import launch_local

        words = ["train", str(self.config), f"data.valid={json.dumps([{'path': str(valid.path)}])}"]
        code = launch_local(self.num_processes, words, run_dir=self.folder / "run")
        if code != 0:
            raise MoetrainError(f"the training in {self.folder / 'run'} ended with exit code {code}; its log says why")
        return json.loads((self.folder / "run" / "summary.json").read_text(encoding="utf-8"))


def _plan(task: GlueTask, data: Path, out: Path, model: Path, base: dict[str, Any], recipe: Recipe) -> _Plan:
    """Convert a task's data and write its config, or refuse a folder that was made with another."""
    from moetrain.config.layout import check_layout
    from moetrain.config.loader import load_config

    folder = (out / task.name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    train = convert_part(data, task, "train", folder)
    dev = {part: convert_part(data, task, part, folder) for part in task.dev}
    steps = max(1, math.ceil(train.examples * recipe.epochs / recipe.batch_size))
    text = yaml.safe_dump(_config(task, folder, model, base, recipe, train, dev, steps), sort_keys=False)
    path = folder / "run.yaml"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ConfigError(f"{path} was made with other settings or data; choose another --out, or delete {folder}")
    path.write_text(text, encoding="utf-8")
    check_layout(load_config([path]), recipe.num_processes)
    return _Plan(folder, path, train, dev, steps, recipe.num_processes)


def _config(
    task: GlueTask,
    folder: Path,
    model: Path,
    base: dict[str, Any],
    recipe: Recipe,
    train: Converted,
    dev: dict[str, Converted],
    steps: int,
) -> dict[str, Any]:
    pooling = "mean" if base["model"].get("type", "decoder") == "encoder" else "last"
    head = {"outputs": len(task.classes) or 1, "pooling": pooling}
    objective: dict[str, Any] = {"type": "classify", "classes": list(task.classes)} if task.classes else {}
    objective = objective or {"type": "regress"}
    if len(task.texts) == 2:
        objective["text_pair"] = "text_pair"
    if recipe.batch_size % recipe.num_processes:
        raise ConfigError(f"--batch-size ({recipe.batch_size}) must be divisible by -n ({recipe.num_processes})")
    tokenizer = {**base["data"]["tokenizer"], "path": str(Path(base["data"]["tokenizer"]["path"]).resolve())}
    return {
        "run": {"dir": str(folder / "run"), "name": f"glue-{task.name}"},
        "model": {**base["model"], "head": head, "seq_length": recipe.seq_length or base["model"]["seq_length"]},
        "data": {
            "tokenizer": tokenizer,
            "train": [{"path": str(train.path)}],
            "valid": [{"path": str(dev[task.dev[0]].path)}],
        },
        "optimizer": {
            "lr": recipe.lr,
            "betas": [0.9, 0.999],
            "weight_decay": 0.01,
            "schedule": {"type": "linear", "warmup_iters": steps // 10},
        },
        "training": {
            "train_iters": steps,
            "global_batch_size": recipe.batch_size,
            "micro_batch_size": recipe.batch_size // recipe.num_processes,
            "precision": base["training"]["precision"],
            "seed": recipe.seed,
            "objective": objective,
        },
        "checkpoint": {"load": str(model.resolve()), "load_weights_only": True, "keep_last": 1},
        "runtime": base.get("runtime", {}),
    }


def write_report(out: Path, model: Path, recipe: Recipe, scores: Sequence[Score]) -> None:
    """`glue.md` and `glue.json` in `out`."""
    average = statistics.fmean(_by_task(scores).values())
    record = {"model": str(model), "recipe": asdict(recipe), "scores": [asdict(s) for s in scores], "average": average}
    lines = [
        "# GLUE",
        "",
        f"Model: `{model}`. {recipe.epochs:g} epochs, {recipe.batch_size} texts a step, peak rate {recipe.lr:g}, seed "
        f"{recipe.seed}; no selection among epochs, rates or seeds. Held-out parts with public labels (`dev`).",
        "",
        "| task | measures | held-out texts | training texts | lines left out | steps |",
        "|---|---|---|---|---|---|",
    ]
    for s in scores:
        name = s.task if s.part == "dev" else f"{s.task} {s.part.removeprefix('dev_')}"
        measures = ", ".join(f"{metric} {value:.4f}" for metric, value in s.scores.items())
        lines.append(f"| {name} | {measures} | {s.examples:,} | {s.train_examples:,} | {s.skipped:,} | {s.steps:,} |")
    lines += ["", f"Mean over tasks (a task's measures and parts are averaged first): {average:.4f}"]
    _replace(out / "glue.json", json.dumps(record, indent=2) + "\n")
    _replace(out / "glue.md", "\n".join(lines) + "\n")


def _by_task(scores: Sequence[Score]) -> dict[str, float]:
    by_task: dict[str, list[float]] = {}
    for s in scores:
        by_task.setdefault(s.task, []).append(statistics.fmean(s.scores.values()))
    return {name: statistics.fmean(values) for name, values in by_task.items()}


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.partial")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
