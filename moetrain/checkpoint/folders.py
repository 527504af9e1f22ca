"""Names, lock and clean-up of a run's checkpoint folder. Used by one process (rank 0) at a time.

* `step-00000010/`: committed.
* `latest`: text, the name of the newest committed folder; `best`: of the one with the lowest validation loss.
* `.lock`: held (flock) by the process that saves.
* `.tmp-*`: a save in progress, or one that died: whoever holds the lock knows that all others are dead.
* `damaged-step-*`: a checkpoint that failed its checksums and stood in the way of a new one.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moetrain.checkpoint.files import OS_FILES, Files, make_folders, remove_tree, write_synced
from moetrain.checkpoint.manifest import MANIFEST_NAME
from moetrain.errors import CheckpointError

LATEST = "latest"
BEST = "best"
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
    name = _read_pointer(pointer)
    if not _STEP.fullmatch(name):
        raise CheckpointError(f"{pointer} holds {name!r}; must be the name of a step folder, such as step-00000010")
    folder = pointer.parent / name
    if not (folder / MANIFEST_NAME).is_file():
        raise CheckpointError(f"{pointer} names {name}, which is not a complete checkpoint (it has no {MANIFEST_NAME})")
    return folder


def pointed_names(root: Path) -> set[str]:
    """The folders that `latest` and `best` name. What cannot be read names nothing."""
    names = set()
    for pointer in (root / LATEST, root / BEST):
        try:
            names.add(_read_pointer(pointer))
        except OSError:
            continue
    return {name for name in names if _STEP.fullmatch(name)}


def _read_pointer(pointer: Path) -> str:
    # A pointer is short; a damaged or hostile one must neither fill memory nor lead out of its folder.
    with pointer.open("rb") as file:
        return file.read(100).decode("ascii", "replace").strip()


@contextmanager
def exclusive(root: Path, files: Files = OS_FILES) -> Iterator[bool]:
    """Hold the root's lock; CheckpointError when another live process does. The kernel drops it when we die.

    Yields False on the rare file systems without locks: then nobody can tell a dead save from a live one.
    """
    make_folders(root, files)
    descriptor = files.open_lock(root / LOCK)
    try:
        yield _lock(descriptor, root)
    finally:
        os.close(descriptor)  # a lock holds no data, so nothing that could fail matters


def _lock(descriptor: int, root: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(f"{root}: another process is saving here; a run folder belongs to one run") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning(
            "%s: the file system has no locks; two runs here would not be noticed, nor remains of saves removed", root
        )
        return False
    return True


def remove_dead_saves(root: Path, files: Files = OS_FILES) -> None:
    """Delete what killed saves and deletions left; what cannot be deleted stays. Only for the holder of the lock."""
    for path in sorted(root.glob(f"{TEMPORARY}*")):
        logger.info("removing %s, left by a save that did not finish", path)
        discard(path, files)


def discard(path: Path, files: Files = OS_FILES) -> None:
    """Delete, if it is there, what nobody reads. Failing at that is worth a warning and never a save."""
    try:
        if path.exists() or path.is_symlink():
            remove_tree(path, files)
    except OSError as error:
        logger.warning("%s could not be removed, and is tried again at the next save: %s", path, error)


def commit(temporary: Path, target: Path, manifest: bytes, token: str, files: Files = OS_FILES) -> None:
    """Turn a folder with all its shard files on disk into the checkpoint `target`, which must not exist.

    Everything that needs space is written before the rename that commits; `latest` follows by a second rename. On an
    error there is no `target`. That `latest` could not follow is a warning: the checkpoint is found without it.
    """
    root = target.parent
    write_synced(temporary / MANIFEST_NAME, manifest, files)
    files.sync_folder(temporary)
    pointer = _new_pointer(root, LATEST, target.name, token)
    try:
        write_synced(pointer, f"{target.name}\n".encode(), files)
        files.rename(temporary, target)
        try:
            files.sync_folder(root)
        except OSError:
            files.rename(target, temporary)  # nobody knows whether the first rename will outlive the machine
            raise
        _replace_pointer(pointer, root / LATEST, files)
    finally:
        discard(pointer, files)


def point(root: Path, name: str, folder: Path, token: str, files: Files = OS_FILES) -> None:
    """Let the pointer `name` name a folder. Failing at that is a warning."""
    pointer = _new_pointer(root, name, folder.name, token)
    try:
        write_synced(pointer, f"{folder.name}\n".encode(), files)
    except OSError as error:
        logger.warning("%s could not be written: %s", root / name, error)
    else:
        _replace_pointer(pointer, root / name, files)
    finally:
        discard(pointer, files)


def remove_checkpoint(folder: Path, token: str, files: Files = OS_FILES) -> None:
    """Delete a checkpoint so that neither a kill nor a loss of power leaves half of it under its name."""
    doomed = folder.with_name(f"{TEMPORARY}removed-{folder.name}-{token}")
    files.rename(folder, doomed)
    files.sync_folder(folder.parent)
    remove_tree(doomed, files)


def set_aside(folder: Path, token: str, files: Files = OS_FILES) -> Path:
    """Move a damaged checkpoint out of the way without losing it."""
    aside = folder.with_name(f"damaged-{folder.name}-{token}")
    files.rename(folder, aside)
    return aside


def _new_pointer(root: Path, name: str, target: str, token: str) -> Path:
    return root / f"{TEMPORARY}{name}-{target}-{token}"


def _replace_pointer(pointer: Path, place: Path, files: Files) -> None:
    try:
        files.rename(pointer, place)
        files.sync_folder(place.parent)
    except OSError as error:
        logger.warning("%s could not be renewed: %s", place, error)
