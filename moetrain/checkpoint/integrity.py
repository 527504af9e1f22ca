"""Whether a file on disk is what the manifest says: its length, which is cheap, and its sum, which is not."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from moetrain.checkpoint.files import OS_FILES, Files
from moetrain.checkpoint.manifest import FileEntry
from moetrain.errors import CheckpointError


def check_size(path: Path, expected: int) -> None:
    """CheckpointError unless `path` is a regular file of so many bytes."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; the manifest says {expected} bytes") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: must be a regular file, not a link, folder or device")
    if status.st_size != expected:
        raise CheckpointError(f"{path}: has {status.st_size} bytes; the manifest says {expected}")


def check_sum(path: Path, expected: FileEntry, files: Files = OS_FILES, from_disk: bool = False) -> None:
    """CheckpointError unless the file's sha256 is the expected one.

    `from_disk` first asks the kernel to forget the file's pages, which must be synced: otherwise a file that was just
    written is read from memory, and a disk that lost it goes unnoticed.
    """
    try:
        with os.fdopen(files.open(path), "rb") as file:
            if from_disk:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if found != expected.sha256:
        raise CheckpointError(f"{path}: damaged: sha256 is {found}, the manifest says {expected.sha256}")
