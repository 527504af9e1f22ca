"""The folder of a demo: the marker that says so, the settings that all its files come from, and the stages done."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain.errors import ConfigError

MARKER = "demo.json"
FORMAT = "moetrain-demo"
_LOCK = ".demo.lock"
_SHOWN_DIFFERENCES = 8


@dataclass(frozen=True)
class Stage:
    """One step of the demo.

    `outputs` exist once it is done. What an interrupted attempt has left of them is deleted before the next attempt,
    unless the stage `continues` from it, as training does. `run` returns JSON values for the closing summary.
    """

    name: str
    title: str
    run: Callable[[], dict[str, Any]]
    outputs: tuple[Path, ...] = ()
    continues: bool = False


@dataclass
class Record:
    """What a finished stage has left: how long it took, and what it found."""

    seconds: float
    result: dict[str, Any]


class DemoFolder:
    """A folder that the demo made; everything in it comes from one set of settings. See `open_folder`."""

    def __init__(self, path: Path, settings: dict[str, Any], records: dict[str, Record]) -> None:
        self.path, self.settings, self.records = path, settings, records

    def check_outputs(self, stages: Sequence[Stage]) -> None:
        """Refuse a folder from which somebody has taken what later stages were made of. Raises ConfigError."""
        for stage in stages:
            missing = [str(path) for path in stage.outputs if stage.name in self.records and not path.exists()]
            if missing:
                raise ConfigError(
                    f"{self.path}: {', '.join(missing)} (of the finished stage {stage.title!r}) is gone; "
                    "start over with --fresh, or in another --dir"
                )

    def clear_remains(self, stage: Stage) -> None:
        """Delete what an interrupted attempt of `stage` left, unless it continues from there."""
        for path in () if stage.continues else stage.outputs:
            _remove(path)

    def record(self, stage: Stage, record: Record) -> None:
        """Note that `stage` is done."""
        self.records[stage.name] = record
        self.save()

    def save(self) -> None:
        """Write the marker; a kill leaves the old one or the new one."""
        stages = {name: {"seconds": record.seconds, "result": record.result} for name, record in self.records.items()}
        text = json.dumps({"format": FORMAT, "version": 1, "settings": self.settings, "stages": stages}, indent=2)
        draft = self.path / f".{MARKER}.partial"
        draft.write_text(text + "\n", encoding="utf-8")
        draft.replace(self.path / MARKER)


@contextmanager
def open_folder(path: Path, settings: dict[str, Any], fresh: bool) -> Iterator[DemoFolder]:
    """The demo's folder, made if absent, held against a second demo meanwhile. `fresh` empties it first.

    Raises ConfigError, with nothing changed, when `path` holds something that no demo made, was made with other
    `settings`, or is in use.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ConfigError(f"--dir {path} is a {'link' if path.is_symlink() else 'file'}; must be a folder or absent")
    strangers = [entry.name for entry in path.iterdir() if entry.name != _LOCK] if path.is_dir() else []
    if strangers and not (path / MARKER).is_file():
        raise ConfigError(
            f"--dir {path} holds {strangers[0]} but no {MARKER}, so no demo made it; nothing was touched: "
            "name an empty or absent folder"
        )
    path.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        records = _read(path / MARKER, settings, fresh) if strangers else {}
        if fresh:
            for entry in path.iterdir():
                if entry.name != _LOCK:
                    _remove(entry)
        folder = DemoFolder(path, settings, records)
        folder.save()
        yield folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with (path / _LOCK).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"--dir {path}: another demo is running there") from None
        yield


def _read(marker: Path, settings: dict[str, Any], fresh: bool) -> dict[str, Record]:
    """The stages done with the same settings; none for a fresh start. Raises ConfigError."""
    try:
        found = json.loads(marker.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ConfigError(f"{marker}: format {found['format']!r}; must be {FORMAT!r}: no demo made this folder")
        before = found["settings"]
        records = {name: Record(entry["seconds"], entry["result"]) for name, entry in found["stages"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{marker}: damaged ({error!r}); delete {marker.parent} yourself, or name another") from error
    if fresh:
        return {}
    differences = list(_differences(before, settings, ""))
    if differences:
        told = "\n".join(f"  {line}" for line in differences[:_SHOWN_DIFFERENCES])
        raise ConfigError(
            f"{marker.parent} holds a demo with other settings; go on with those, start over with --fresh, or name "
            f"another --dir. {len(differences)} differ:\n{told}"
        )
    return records


def _differences(before: Any, now: Any, path: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            yield from _differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
    elif before != now:
        yield f"{path}: {json.dumps(before)} there, {json.dumps(now)} now"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
