"""`moetrain claims glue`: fine-tune a pretrained model on GLUE's tasks and report their measures."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
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
    weight_decay: float
    seq_length: int | None
    seeds: tuple[int, ...]
    num_processes: int


@dataclass(frozen=True)
class Score:
    """What one part of a task gave to one arm with one seed. `mean_k`: experts per token in the last step of training;
    None without MoE layers."""

    task: str
    part: str
    arm: str
    seed: int
    scores: dict[str, float]
    examples: int
    train_examples: int
    skipped: int
    steps: int
    mean_k: float | None = None


class Dropped(StrEnum):
    """What a token gets that finds no place at its expert."""

    zero = "zero"
    input = "input"


def glue(
    model: Annotated[
        Path,
        typer.Option(
            help="checkpoint of a pretrained model (a step, `checkpoints` or run folder), or a Hugging Face folder, "
            "which is imported into --out; of a Switch Transformer the encoder"
        ),
    ],
    data: Annotated[Path, typer.Option(help="folder with GLUE's folders: CoLA, SST-2, MRPC ...")],
    out: Annotated[Path, typer.Option(help="runs, glue.md and glue.json; a second call goes on there")] = Path(
        "runs/glue"
    ),
    tasks: Annotated[list[str] | None, typer.Option("--task", help="only these; default: those in --data")] = None,
    arms: Annotated[
        list[str] | None,
        typer.Option("--arm", help="plain (default), hypermoe, damoe-col, damoe-row, damoe-mean-k; all that are named"),
    ] = None,
    epochs: Annotated[float, typer.Option(min=0.01, help="times through the training examples")] = 3.0,
    batch_size: Annotated[int, typer.Option(min=1, help="texts per step")] = 32,
    lr: Annotated[float, typer.Option(min=0.0, help="peak learning rate; a tenth of the steps warm up to it")] = 3e-5,
    weight_decay: Annotated[float, typer.Option(min=0.0, help="AdamW's")] = 0.01,
    seq_length: Annotated[int | None, typer.Option(min=4, help="tokens of a sample; default: the model's")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the head and the order of the texts")] = 1234,
    seeds: Annotated[int, typer.Option(min=1, help="trainings of each task and arm, with seeds from --seed on")] = 1,
    num_processes: Annotated[int, typer.Option("--num-processes", "-n", min=1, help="data-parallel ranks")] = 1,
    dropped: Annotated[
        Dropped | None,
        typer.Option(help="of an imported Switch Transformer: what a token without a place at its expert gets (zero)"),
    ] = None,
) -> None:
    """Fine-tune on GLUE's tasks, one after another, and report what the held-out parts give."""
    from moetrain.claims.glue_arms import check_arms, checkpoint_of, start_of

    of_seeds = tuple(range(seed, seed + seeds))
    recipe = Recipe(epochs, batch_size, lr, weight_decay, seq_length, of_seeds, num_processes)
    chosen, compared = _choose(data, tasks), arms or ["plain"]
    check_arms(compared)
    for task in chosen:
        check_task(data, task)
    pretrained = checkpoint_of(model, out, None if dropped is None else dropped.value, typer.echo)
    material = {task.name: _converted(task, data, out) for task in chosen}
    plans = []
    for arm in compared:
        start = start_of(arm, pretrained, out, seed, typer.echo)
        base = _settings(start)
        plans += [
            _plan(task, arm, s, out, start, base, recipe, material[task.name]) for task in chosen for s in of_seeds
        ]
    scores = [score for plan in plans for score in plan.run()]
    write_report(out, model, recipe, scores)
    typer.echo((out / "glue.md").read_text(encoding="utf-8"))


def _choose(data: Path, names: Sequence[str] | None) -> list[GlueTask]:
    if unknown := [name for name in names or [] if name not in GLUE]:
        raise ConfigError(f"--task ({', '.join(unknown)}) is no task of GLUE; legal: {', '.join(GLUE)}")
    found = find_tasks(data)
    if absent := [name for name in names or [] if name not in {task.name for task in found}]:
        raise ConfigError(f"--task ({', '.join(absent)}) has no folder in --data ({data})")
    return [task for task in found if not names or task.name in names]


def _settings(checkpoint: Path) -> dict[str, Any]:
    """The settings that a checkpoint was made with."""
    from moetrain.checkpoint import CheckpointReader

    with CheckpointReader(checkpoint) as reader:
        return dict(reader.config)


@dataclass(frozen=True)
class _Plan:
    """One training of one task, checked and ready."""

    task: GlueTask
    arm: str
    seed: int
    folder: Path
    config: Path
    train: Converted
    dev: dict[str, Converted]
    steps: int
    num_processes: int

    def run(self) -> list[Score]:
        """Train (or go on), then judge each held-out part: a finished run that is started again only validates."""
        scores = []
        for part, converted in self.dev.items():
            summary = self._launch(converted)
            kept = {name: summary["eval_scores"][name] for name in self.task.metrics}
            skipped = converted.skipped + self.train.skipped
            counts = converted.examples, self.train.examples, skipped, self.steps, self._mean_k()
            scores.append(Score(self.task.name, part, self.arm, self.seed, kept, *counts))
        return scores

    def _mean_k(self) -> float | None:
        lines = (self.folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return next((row["train/mean_k"] for row in map(json.loads, reversed(lines)) if "train/mean_k" in row), None)

    def _launch(self, valid: Converted) -> dict[str, Any]:
        from moetrain.launch.local import launch_local

        words = ["train", str(self.config), f"data.valid={json.dumps([{'path': str(valid.path)}])}"]
        code = launch_local(self.num_processes, words, run_dir=self.folder / "run")
        if code != 0:
            raise MoetrainError(f"the training in {self.folder / 'run'} ended with exit code {code}; its log says why")
        return json.loads((self.folder / "run" / "summary.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class _Material:
    """A task's data as examples."""

    train: Converted
    dev: dict[str, Converted]


def _converted(task: GlueTask, data: Path, out: Path) -> _Material:
    folder = (out / task.name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    train = convert_part(data, task, "train", folder)
    return _Material(train, {part: convert_part(data, task, part, folder) for part in task.dev})


def _plan(
    task: GlueTask,
    arm: str,
    seed: int,
    out: Path,
    start: Path,
    base: dict[str, Any],
    recipe: Recipe,
    material: _Material,
) -> _Plan:
    """Write a training's config, or refuse a folder that was made with another."""
    from moetrain.config.layout import check_layout
    from moetrain.config.loader import load_config

    folder = (out / task.name / arm / f"seed-{seed}").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    train, dev = material.train, material.dev
    steps = max(1, math.ceil(train.examples * recipe.epochs / recipe.batch_size))
    tree = _config(task, seed, folder, start, base, recipe, train, dev, steps)
    text, path = yaml.safe_dump(tree, sort_keys=False), folder / "run.yaml"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ConfigError(f"{path} was made with other settings or data; choose another --out, or delete {folder}")
    path.write_text(text, encoding="utf-8")
    check_layout(load_config([path]), recipe.num_processes)
    return _Plan(task, arm, seed, folder, path, train, dev, steps, recipe.num_processes)


def _config(
    task: GlueTask,
    seed: int,
    folder: Path,
    start: Path,
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
            "weight_decay": recipe.weight_decay,
            "schedule": {"type": "linear", "warmup_iters": steps // 10},
        },
        "training": {
            "train_iters": steps,
            "global_batch_size": recipe.batch_size,
            "micro_batch_size": recipe.batch_size // recipe.num_processes,
            "precision": base["training"]["precision"],
            "seed": seed,
            "objective": objective,
        },
        "checkpoint": {"load": str(start.resolve()), "load_weights_only": True, "keep_last": 1},
        "runtime": base.get("runtime", {}),
    }


def write_report(out: Path, model: Path, recipe: Recipe, scores: Sequence[Score]) -> None:
    """`glue.md` and `glue.json` in `out`."""
    arms = list(dict.fromkeys(s.arm for s in scores))
    averages = {arm: _average([s for s in scores if s.arm == arm]) for arm in arms}
    record = {"model": str(model), "recipe": asdict(recipe), "scores": [asdict(s) for s in scores]}
    seeds = ", ".join(map(str, recipe.seeds))
    lines = [
        "# GLUE",
        "",
        f"Model: `{model}`. {recipe.epochs:g} epochs, {recipe.batch_size} texts a step, peak rate {recipe.lr:g}, "
        f"weight decay {recipe.weight_decay:g}, seeds {seeds}; no selection among epochs, rates or seeds. Held-out "
        "parts with public labels (`dev`). Measures of several seeds: mean and standard deviation. Mean K: experts per "
        "token in the last step.",
        "",
        "| task | arm | measures | mean K | held-out texts | training texts | lines left out | steps |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (task, part, arm), group in _groups(scores).items():
        name = task if part == "dev" else f"{task} {part.removeprefix('dev_')}"
        measures = ", ".join(f"{m} {_spread([s.scores[m] for s in group])}" for m in group[0].scores)
        s = group[0]
        mean_k = "" if s.mean_k is None else f"{statistics.fmean(g.mean_k or 0.0 for g in group):.2f}"
        counts = f"{mean_k} | {s.examples:,} | {s.train_examples:,} | {s.skipped:,} | {s.steps:,}"
        lines.append(f"| {name} | {arm} | {measures} | {counts} |")
    lines += ["", "Mean over tasks (a task's measures, parts and seeds are averaged first):", ""]
    lines += [f"- {arm}: {average:.4f}" for arm, average in averages.items()]
    if len(recipe.seeds) > 1 and "plain" in arms and len(arms) > 1:
        lines += _differences(scores, [arm for arm in arms if arm != "plain"])
    _replace(out / "glue.json", json.dumps(record | {"averages": averages}, indent=2) + "\n")
    _replace(out / "glue.md", "\n".join(lines) + "\n")


def _groups(scores: Sequence[Score]) -> dict[tuple[str, str, str], list[Score]]:
    """By task, part and arm; of each the seeds."""
    order = {task: i for i, task in enumerate(GLUE)}
    groups: dict[tuple[str, str, str], list[Score]] = {}
    for s in sorted(scores, key=lambda s: order[s.task]):
        groups.setdefault((s.task, s.part, s.arm), []).append(s)
    return groups


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


def _differences(scores: Sequence[Score], arms: Sequence[str]) -> list[str]:
    """Of each arm to the plain one, by seeds."""
    from moetrain.claims.intervals import paired_difference

    lines = ["", "Difference to plain (mean over tasks; pairs of equal seeds, 95 % interval of Student's t):", ""]
    seeds = sorted({s.seed for s in scores})

    def means(arm: str) -> list[float]:
        return [_average([s for s in scores if s.arm == arm and s.seed == seed]) for seed in seeds]

    for arm in arms:
        d = paired_difference(means(arm), means("plain"))
        lines.append(f"- {arm}: {d.mean:+.4f} ({d.low:+.4f} to {d.high:+.4f}, {d.pairs} pairs)")
    return lines


def _average(scores: Sequence[Score]) -> float:
    """Over tasks, of whose measures, parts and seeds the mean is taken first."""
    by_task: dict[str, list[float]] = {}
    for s in scores:
        by_task.setdefault(s.task, []).append(statistics.fmean(s.scores.values()))
    return statistics.fmean(statistics.fmean(values) for values in by_task.values())


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.partial")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
