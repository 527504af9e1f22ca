"""Outputs that exist whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moetrain.errors import DataError


@contextmanager
def staged(*finals: Path, overwrite: bool = False) -> Iterator[tuple[Path, ...]]:
    """Give a path to write for each path in `finals`, and rename them into place when the block ends well.

    The files (or folders) are written in a hidden `.partial` folder beside their final place, flushed to disk, then
    renamed in the order given: make the last one the file without which the others do not count. A failed block leaves
    nothing; a killed process leaves at most the hidden folder. With `overwrite`, files that are there are replaced.

    Errors: DataError when a final path exists already (without `overwrite`), or when the disk refuses.
    """
    folder = finals[0].parent
    assert all(path.parent == folder for path in finals), "renames are atomic only inside one folder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not overwrite:
            _refuse_existing(finals)
        partial = Path(tempfile.mkdtemp(prefix=f".{finals[0].name}.", suffix=".partial", dir=folder))
    except OSError as error:
        raise DataError(f"cannot write {finals[0]}: {error.strerror or error}") from error
    try:
        drafts = tuple(partial / path.name for path in finals)
        yield drafts
        for draft in drafts:
            _flush(draft)
        if not overwrite:
            _refuse_existing(finals)  # somebody may have been faster
        for draft, final in zip(drafts, finals, strict=True):
            draft.replace(final)
        _flush_folder(folder)
    except OSError as error:
        raise DataError(f"cannot write {finals[0]}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _refuse_existing(finals: tuple[Path, ...]) -> None:
    present = [str(path) for path in finals if path.exists()]
    if present:
        raise DataError(f"refusing to overwrite {', '.join(present)}: delete it first, or choose another name")


def _flush(path: Path) -> None:
    """Push a file, or every file of a folder, to the disk, so that a rename never commits what a crash can lose."""
    for file in sorted(path.iterdir()) if path.is_dir() else (path,):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
