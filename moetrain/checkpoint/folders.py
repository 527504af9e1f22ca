"""Names, lock and clean-up of a run's checkpoint folder. Used by one process (rank 0) at a time.

* `step-00000010/`: committed.
* `latest`: text, the name of the newest committed folder.
* `.lock`: held (flock) by the process that saves.
* `.tmp-*`: a save in progress, or one that died: whoever holds the lock knows that all others are dead.
* `damaged-step-*`: a checkpoint that failed its checksums and stood in the way of a new one.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moetrain.checkpoint.manifest import MANIFEST_NAME
from moetrain.checkpoint.store import sync_folder, write_synced
from moetrain.errors import CheckpointError

LATEST = "latest"
LOCK = ".lock"
TEMPORARY = ".tmp-"

_STEP = re.compile(r"step-(\d{8,18})")
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)

logger = logging.getLogger(__name__)


def step_name(step: int) -> str:
    """Folder name of a step."""
    return f"step-{step:08d}"


def step_folders(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of everything named like a checkpoint, newest first. Links are not followed."""
    if not root.is_dir():
        return []
    matches = [(_STEP.fullmatch(path.name), path) for path in root.iterdir()]
    found = [(int(match[1]), path) for match, path in matches if match and path.is_dir() and not path.is_symlink()]
    return sorted(found, reverse=True)


def find_step_folder(path: Path) -> Path:
    """The committed step folder that a user means: `path` itself, or what its `latest` or `checkpoints/latest` names.

    CheckpointError when there is none, or when `latest` holds anything but the name of a folder beside it.
    """
    if (path / MANIFEST_NAME).is_file():
        return path
    for root in (path, path / "checkpoints"):
        if (root / LATEST).is_file():
            return _named_by(root / LATEST)
    raise CheckpointError(
        f"{path} is no checkpoint: expected a step folder (with {MANIFEST_NAME}), a folder of step folders (with "
        f"{LATEST}), or a run folder (with checkpoints/)"
    )


def _named_by(pointer: Path) -> Path:
    # A pointer is short; a damaged or hostile one must neither fill memory nor lead out of its folder.
    with pointer.open("rb") as file:
        name = file.read(100).decode("ascii", "replace").strip()
    if not _STEP.fullmatch(name):
        raise CheckpointError(f"{pointer} holds {name!r}; must be the name of a step folder, such as step-00000010")
    folder = pointer.parent / name
    if not (folder / MANIFEST_NAME).is_file():
        raise CheckpointError(f"{pointer} names {name}, which is not a complete checkpoint (it has no {MANIFEST_NAME})")
    return folder


@contextmanager
def exclusive(root: Path) -> Iterator[bool]:
    """Hold the root's lock; CheckpointError when another live process does. The kernel drops it when we die.

    Yields False on the rare file systems without locks: then nobody can tell a dead save from a live one.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / LOCK).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{root}: another process is saving here; a run folder belongs to one run") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning("%s: the file system has no locks; remains of dead saves are left in place", root)
            yield False
        else:
            yield True


def remove_dead_saves(root: Path) -> None:
    """Delete what killed saves and deletions left. Only for the holder of the lock."""
    for path in root.glob(f"{TEMPORARY}*"):
        logger.info("removing %s, left by a save that did not finish", path)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def commit(temporary: Path, target: Path, manifest: bytes, token: str) -> None:
    """Turn a folder with all its shard files on disk into the checkpoint `target`, which must not exist.

    Everything that needs space is written before the rename that commits; `latest` follows by a second rename.
    """
    root = target.parent
    write_synced(temporary / MANIFEST_NAME, manifest)
    sync_folder(temporary)
    pointer = root / f"{TEMPORARY}{LATEST}-{token}"
    try:
        write_synced(pointer, f"{target.name}\n".encode())
        temporary.rename(target)
        sync_folder(root)
        pointer.replace(root / LATEST)
        sync_folder(root)
    finally:
        pointer.unlink(missing_ok=True)


def remove_checkpoint(folder: Path, token: str) -> None:
    """Delete a checkpoint so that a kill on the way leaves no half of it under its name."""
    doomed = folder.with_name(f"{TEMPORARY}removed-{folder.name}-{token}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def set_aside(folder: Path, token: str) -> Path:
    """Move a damaged checkpoint out of the way without losing it."""
    aside = folder.with_name(f"damaged-{folder.name}-{token}")
    folder.rename(aside)
    return aside
