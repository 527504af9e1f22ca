"""Which checkpoints may go."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from moetrain.checkpoint.folders import step_folders
from moetrain.checkpoint.integrity import check_size
from moetrain.checkpoint.manifest import MANIFEST_NAME
from moetrain.checkpoint.reader import CheckpointReader
from moetrain.errors import CheckpointError


@dataclass(frozen=True)
class Saved:
    """A sound checkpoint. `loss`: of a validation of these very weights, if there was one."""

    step: int
    folder: Path
    loss: float | None = None


@dataclass(frozen=True)
class Retention:
    """What stays: the newest `last`; every step that `every` divides; the `best` with the lowest validation loss."""

    last: int
    every: int | None = None
    best: int = 0

    def __post_init__(self) -> None:
        if self.last < 1:
            raise ValueError(f"keep_last ({self.last}) must be at least 1")
        if self.every is not None and self.every < 1:
            raise ValueError(f"keep_every ({self.every}) must be at least 1")
        if self.best < 0:
            raise ValueError(f"keep_best ({self.best}) must be at least 0")

    def doomed(self, saved: Iterable[Saved], named: Collection[str] = ()) -> list[Saved]:
        """The checkpoints that no rule keeps, oldest first. Folders in `named` stay (`latest` and `best` name them)."""
        newest = sorted(saved, key=lambda one: one.step, reverse=True)
        kept = {one.folder.name for one in [*newest[: self.last], *ranked(newest)[: self.best]]} | set(named)
        kept |= {one.folder.name for one in newest if self.every is not None and one.step % self.every == 0}
        return [one for one in reversed(newest) if one.folder.name not in kept]


def ranked(saved: Iterable[Saved]) -> list[Saved]:
    """Those that were validated, best first; of equals the newest."""
    return sorted((one for one in saved if one.loss is not None), key=lambda one: (one.loss, -one.step))


class Survey:
    """Looks through a root again and again, and reads each manifest once: those of large runs take seconds to parse,
    which a thread beside training should not spend at every save."""

    def __init__(self) -> None:
        self._read: dict[tuple[str, int, int], _Seen] = {}

    def look(self, root: Path) -> list[Saved]:
        """All checkpoints under a root whose manifest is sound and whose files have their length, newest first."""
        found, seen = [], {}
        for step, folder in step_folders(root):
            try:
                status = (folder / MANIFEST_NAME).lstat()
                key = (folder.name, status.st_ino, status.st_mtime_ns)
                known = seen[key] = self._read.get(key) or _Seen.of(folder)
                for name, size in known.sizes.items():
                    check_size(folder / name, size)
            except (CheckpointError, FileNotFoundError):
                continue
            found.append(Saved(step, folder, known.loss))
        self._read = seen
        return found


@dataclass(frozen=True)
class _Seen:
    sizes: dict[str, int]
    loss: float | None

    @classmethod
    def of(cls, folder: Path) -> _Seen:
        reader = CheckpointReader(folder, verify="none")
        files = reader.manifest.record.files
        return cls({name: file.bytes for name, file in files.items()}, validation_loss(reader))


def validation_loss(reader: CheckpointReader) -> float | None:
    """What the saver put into `extra`, if it is of this step: another step's loss is that of other weights."""
    evaluation = reader.extra.get("evaluation")
    if not isinstance(evaluation, dict) or evaluation.get("iteration") != reader.step:
        return None
    loss = evaluation.get("loss")
    if not isinstance(loss, int | float) or isinstance(loss, bool) or not math.isfinite(loss):
        return None
    return float(loss)
