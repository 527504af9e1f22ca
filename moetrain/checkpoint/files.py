"""Every file operation of a save, each behind one method, so that a test can make any of them fail.

What a save promises (all or nothing, whatever happens) can only be proven if all that it does to the disk is seen.
Tests hand a `Files` of their own to `CheckpointManager`: it counts the operations, and at the n-th kills the process,
fills the disk, writes short or returns an error (tests/unit/checkpoint/faults.py).
"""

from __future__ import annotations

import errno
import os
from pathlib import Path


class Files:
    """The operating system's calls, unchanged. All raise OSError."""

    def make_folder(self, path: Path) -> None:
        """mkdir(2)."""
        path.mkdir()

    def create(self, path: Path) -> int:
        """A descriptor for writing a file that must not exist."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def open(self, path: Path) -> int:
        """A descriptor for reading."""
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def open_lock(self, path: Path) -> int:
        """A descriptor to lock; the file is created if it is not there, and never read or written."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def write(self, descriptor: int, data: memoryview) -> int:
        """write(2): how many bytes were taken, which can be fewer than were given."""
        return os.write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        """Wait until a file's bytes are on disk."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """close(2): network file systems report a failed write as late as here."""
        os.close(descriptor)

    def sync_folder(self, path: Path) -> None:
        """Wait until a folder's entries (creations, renames) are on disk; without it a rename can outrun its file."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """rename(2): atomic, and a file takes the place of another."""
        source.rename(target)

    def unlink(self, path: Path) -> None:
        """unlink(2)."""
        path.unlink()

    def remove_folder(self, path: Path) -> None:
        """rmdir(2)."""
        path.rmdir()


OS_FILES = Files()


def write_all(descriptor: int, data: memoryview, files: Files = OS_FILES) -> None:
    """Write all of it, in as many calls as the file system takes."""
    while data:
        taken = files.write(descriptor, data)
        if taken == 0:
            raise OSError("the file system took none of the bytes that it was given")
        data = data[taken:]


def write_synced(path: Path, data: bytes, files: Files = OS_FILES) -> None:
    """Write a new small file, wait until it is on disk, and look what it holds. FileExistsError when it exists."""
    descriptor = files.create(path)
    try:
        write_all(descriptor, memoryview(data), files)
        files.sync(descriptor)
    finally:
        files.close(descriptor)
    if path.read_bytes() != data:
        raise OSError(errno.EIO, "the disk does not give back what was written", str(path))


def make_folders(path: Path, files: Files = OS_FILES) -> None:
    """Create a folder and those above it that are missing, each entry on disk before the next."""
    if path.is_dir():
        return
    make_folders(path.parent, files)
    files.make_folder(path)
    files.sync_folder(path.parent)


def remove_tree(path: Path, files: Files = OS_FILES) -> None:
    """Delete a file, a link (not what it names) or a folder with all that is in it."""
    if path.is_symlink() or not path.is_dir():
        files.unlink(path)
        return
    for entry in sorted(path.iterdir()):
        remove_tree(entry, files)
    files.remove_folder(path)
