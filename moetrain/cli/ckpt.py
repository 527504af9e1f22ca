"""`moetrain ckpt`: list checkpoints, look into them, check them, compare two, remove old ones."""

from __future__ import annotations

import json
import math
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moetrain.errors import CheckpointError

if TYPE_CHECKING:
    from moetrain.checkpoint import CheckpointReader

app = typer.Typer(no_args_is_help=True, help="List, look into, check, compare and thin out checkpoints.")

Root = Annotated[Path, typer.Argument(help="a run folder, or its checkpoints folder")]
One = Annotated[Path, typer.Argument(help="a step folder, or a run or checkpoints folder (its newest)")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


@app.command("ls")
def list_all(root: Root, as_json: AsJson = False) -> None:
    """List the checkpoints of a run, the newest first, with what is wrong with damaged ones (lengths, not sums)."""
    from moetrain.checkpoint.folders import pointed_names, step_folders

    folder = _root(root)
    named = pointed_names(folder)
    rows = [_row(step, path, named) for step, path in step_folders(folder)]
    if as_json:
        _print_json(rows)
        return
    table = _table("step", "saved", "GB", "validation loss", "layout", "state")
    for row in rows:
        loss = "" if row["loss"] is None else f"{row['loss']:.4f}"
        state = row["error"] or ("complete, named by latest or best" if row["named"] else "complete")
        table.add_row(str(row["step"]), row["saved"], f"{row['bytes'] / 1e9:.3f}", loss, row["layout"], Text(state))
    Console(highlight=False).print(table)


@app.command()
def inspect(
    path: One,
    tensors: Annotated[bool, typer.Option("--tensors", help="list every tensor")] = False,
    as_json: AsJson = False,
) -> None:
    """Tell what a checkpoint holds: step, the layout it was made on, sizes by use, files with their sums."""
    from moetrain.checkpoint.contents import parts

    reader = _open(path)
    told = {
        "folder": str(reader.folder),
        "step": reader.step,
        "consumed_samples": reader.consumed_samples,
        "layout": reader.layout,
        "extra": reader.extra,
        "parts": {name: vars(part) for name, part in parts(reader).items()},
        "files": {name: _file_facts(file) for name, file in sorted(reader.manifest.record.files.items())},
    }
    if tensors:
        entries = reader.manifest.record.tensors
        told["tensors"] = {
            name: {"dtype": entry.dtype, "shape": list(entry.shape), "pieces": len(entry.shards)}
            for name, entry in entries.items()
        }
    if as_json:
        _print_json(told)
    else:
        _print_contents(told)


@app.command()
def verify(
    path: One,
    every: Annotated[bool, typer.Option("--all", help="all checkpoints of the run, not the newest alone")] = False,
    as_json: AsJson = False,
) -> None:
    """Read every byte and compare it with the sums of the manifest. Exit code 1 if a checkpoint is damaged."""
    from moetrain.checkpoint import CheckpointReader, find_step_folder
    from moetrain.checkpoint.folders import step_folders

    folders = [folder for _, folder in step_folders(_root(path))] if every else [find_step_folder(path)]
    results = []
    for folder in folders:
        problems = []
        try:
            reader = CheckpointReader(folder, verify="none")
        except CheckpointError as error:
            problems.append(str(error))
        else:
            for name in reader.files():  # all of them: whoever repairs wants the whole list
                try:
                    reader.verify_files([name])
                except CheckpointError as error:
                    problems.append(str(error))
        results.append({"folder": str(folder), "sound": not problems, "problems": problems})
        if not as_json:
            typer.echo(f"{folder}: {'sound' if not problems else 'damaged'}")
            for problem in problems:
                typer.echo(f"  {problem}")
    if as_json:
        _print_json(results)
    if not all(result["sound"] for result in results):
        raise typer.Exit(1)


@app.command()
def diff(
    a: One,
    b: One,
    every: Annotated[bool, typer.Option("--all", help="list equal tensors too")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare two checkpoints tensor by tensor, whatever layouts made them. Exit code 1 if they differ in a bit."""
    from moetrain.checkpoint.contents import differences

    with _open(a) as first, _open(b) as second:
        found = list(differences(first, second))
    unequal = [one for one in found if not one.is_equal]
    shown = found if every else unequal
    if as_json:
        _print_json([{**vars(one), "equal": one.is_equal} for one in shown])
    else:
        table = _table("tensor", "max |difference|", "elements that differ")
        for one in shown:
            if one.only_in or one.mismatch:
                what = f"only in {a if one.only_in == 'a' else b}" if one.only_in else one.mismatch
                table.add_row(Text(one.name), Text(what), "")
            else:
                table.add_row(Text(one.name), f"{one.max_abs:.3g}", f"{one.differing:,} of {one.elements:,}")
        if shown:
            Console(highlight=False).print(table)
        typer.echo(f"{len(found) - len(unequal)} of {len(found)} tensors are equal to the bit")
    if unequal:
        raise typer.Exit(1)


@app.command()
def prune(
    root: Root,
    keep_last: Annotated[int, typer.Option(min=1, help="newest to keep")],
    keep_every: Annotated[int | None, typer.Option(min=1, help="keep every step that this divides")] = None,
    keep_best: Annotated[int, typer.Option(min=0, help="keep so many with the lowest validation loss")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would go, and remove nothing")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove the checkpoints that no rule keeps: the rules of `checkpoint.keep_*`. What `latest` or `best` names stays,
    and so does every damaged one. Refused while a save is going on."""
    from moetrain.checkpoint.folders import exclusive, pointed_names, remove_checkpoint
    from moetrain.checkpoint.retention import Retention, Survey

    folder = _root(root)
    rules = Retention(keep_last, keep_every, keep_best)
    with exclusive(folder):
        saved = Survey().look(folder)
        doomed = rules.doomed(saved, pointed_names(folder))
        sizes = {one.step: sum(path.stat().st_size for path in one.folder.iterdir()) for one in doomed}
        for one in doomed:
            if not dry_run:
                try:
                    remove_checkpoint(one.folder, secrets.token_hex(4))
                except OSError as error:
                    raise CheckpointError(f"{one.folder} could not be removed: {error.strerror}") from error
    told = {
        "removed": [{"step": step, "bytes": size} for step, size in sizes.items()],
        "kept": [one.step for one in saved if one.step not in sizes],
        "dry_run": dry_run,
    }
    if as_json:
        _print_json(told)
        return
    for step, size in sizes.items():
        typer.echo(f"{'would remove' if dry_run else 'removed'} step {step} ({size / 1e9:.3f} GB)")
    typer.echo(f"kept: {', '.join(map(str, told['kept'])) or 'none'}")


# --- small parts ----------------------------------------------------------------------------------------------------


def _file_facts(file: Any) -> dict[str, Any]:
    """Of a dataclass with slots."""
    return {"bytes": file.bytes, "sha256": file.sha256}


def _root(path: Path) -> Path:
    from moetrain.checkpoint.folders import step_folders

    for root in (path, path / "checkpoints"):
        if step_folders(root):
            return root
    raise CheckpointError(f"{path}: no checkpoints here; give a run folder (with checkpoints/) or a checkpoints folder")


def _open(path: Path) -> CheckpointReader:
    from moetrain.checkpoint import CheckpointReader, find_step_folder

    return CheckpointReader(find_step_folder(path), verify="size")


def _row(step: int, folder: Path, named: set[str]) -> dict[str, Any]:
    from moetrain.checkpoint import CheckpointReader
    from moetrain.checkpoint.retention import validation_loss

    row = {"step": step, "folder": str(folder), "saved": "", "bytes": 0, "loss": None, "layout": "", "error": None}
    row["named"] = folder.name in named
    try:
        reader = CheckpointReader(folder, verify="size")
    except CheckpointError as error:
        return {**row, "error": str(error)}
    written = datetime.fromtimestamp((folder / "manifest.json").stat().st_mtime, UTC)
    return {
        **row,
        "saved": f"{written:%Y-%m-%d %H:%M:%SZ}",
        "bytes": sum(file.bytes for file in reader.manifest.record.files.values()),
        "loss": validation_loss(reader),
        "layout": str(reader.layout.get("description", "")),
    }


def _print_contents(told: dict[str, Any]) -> None:
    console = Console(highlight=False)
    for name in ("folder", "step", "consumed_samples"):
        console.print(Text(f"{name.replace('_', ' '):18}{told[name]}"), soft_wrap=True)
    console.print(Text(f"{'made on':18}{told['layout'].get('description', 'unknown')}"), soft_wrap=True)
    for name, value in told["extra"].items():
        console.print(Text(f"{name.replace('_', ' '):18}{json.dumps(value)}"), soft_wrap=True)
    table = _table("part", "tensors", "elements", "GB")
    for name, part in told["parts"].items():
        table.add_row(name, f"{part['tensors']:,}", f"{part['elements']:,}", f"{part['nbytes'] / 1e9:.6f}")
    console.print(table)
    table = _table("file", "bytes", "sha256")
    for name, file in told["files"].items():
        table.add_row(name, f"{file['bytes']:,}", file["sha256"])
    console.print(table)
    if "tensors" in told:
        table = _table("tensor", "dtype", "shape", "pieces")
        for name, entry in told["tensors"].items():
            table.add_row(Text(name), entry["dtype"], Text(str(entry["shape"])), str(entry["pieces"]))
        console.print(table)


def _table(first: str, *names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    for name in names:
        table.add_column(name, overflow="fold")
    return table


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    """NaN has no JSON; an infinity neither."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value
