"""A folder that is complete or absent, whatever happens while it is written."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moetrain.errors import ConversionError


def refuse_nonempty(out: Path) -> None:
    """ConversionError unless `out` is absent or an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConversionError(
            f"{out} exists and is not an empty folder; nothing is overwritten: choose another, or delete it"
        )


def refuse_full_disk(out: Path, needed: int) -> None:
    """ConversionError unless the disk of `out` has `needed` bytes."""
    free = shutil.disk_usage(next(parent for parent in out.absolute().parents if parent.exists())).free
    if free < needed:
        raise ConversionError(f"{out} needs {needed / 1e9:.1f} GB for weights; its disk has {free / 1e9:.1f} GB free")


@contextmanager
def appearing_whole(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that becomes `out` if the block ends well, and vanishes otherwise."""
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        yield draft
        draft.chmod(0o777 & ~_umask())
        draft.replace(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _umask() -> int:
    """The process's umask. `mkdtemp` ignores it, and an export that only its owner can read surprises all others."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
