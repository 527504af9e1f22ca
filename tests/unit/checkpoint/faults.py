"""Disks that fail: `Files` that count what a save does and, at one operation, do something else."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moetrain.checkpoint.files import Files

OPERATIONS = (
    "make_folder",
    "create",
    "open",
    "open_lock",
    "write",
    "sync",
    "close",
    "sync_folder",
    "rename",
    "unlink",
    "remove_folder",
)
NEEDS_SPACE = ("make_folder", "create", "open_lock", "write")
KILLED = 77

Call = Callable[[], Any]
Fault = Callable[[str, tuple, Call], Any]


class WatchedFiles(Files):
    """Passes every operation by `watch(number, name, arguments, call)`, which makes the call or does not."""

    def __init__(self, watch: Callable[[int, str, tuple, Call], Any]) -> None:
        self.watch = watch
        self.count = 0


def _watched(name: str) -> Callable[..., Any]:
    def operation(self: WatchedFiles, *arguments: Any) -> Any:
        self.count += 1
        return self.watch(self.count, name, arguments, lambda: getattr(Files, name)(self, *arguments))

    return operation


for _name in OPERATIONS:
    setattr(WatchedFiles, _name, _watched(_name))


def sound_files() -> WatchedFiles:
    return WatchedFiles(lambda number, name, arguments, call: call())


def failing_files(at: int, fault: Fault, forever: bool = False) -> WatchedFiles:
    """Operation number `at` (1-based) fails; `forever`: all from there on."""

    def watch(number: int, name: str, arguments: tuple, call: Call) -> Any:
        return fault(name, arguments, call) if number == at or (forever and number > at) else call()

    return WatchedFiles(watch)


def kill(name: str, arguments: tuple, call: Call) -> Any:
    os._exit(KILLED)


def write_short_and_kill(name: str, arguments: tuple, call: Call) -> Any:
    """Half of a write reaches the file; anything else is done, and then the process dies."""
    _half(name, arguments, call)
    os._exit(KILLED)


def full_disk(name: str, arguments: tuple, call: Call) -> Any:
    """What needs space fails, a write after its first half."""
    if name not in NEEDS_SPACE:
        return call()
    if name == "write":
        _half(name, arguments, call)
    raise OSError(errno.ENOSPC, "No space left on device")


def input_output_error(name: str, arguments: tuple, call: Call) -> Any:
    if name == "close":  # the descriptor is gone whatever close returns
        call()
    raise OSError(errno.EIO, "Input/output error")


def lose_half(name: str, arguments: tuple, call: Call) -> Any:
    """A disk that lies: says that it wrote, and wrote half."""
    if name != "write":
        return call()
    _half(name, arguments, call)
    return len(arguments[1])


def flip_bit(name: str, arguments: tuple, call: Call) -> Any:
    """A disk that lies: writes something else."""
    if name != "write":
        return call()
    data = bytearray(arguments[1])
    data[len(data) // 2] ^= 1
    os.write(arguments[0], data)
    return len(data)


def _half(name: str, arguments: tuple, call: Call) -> None:
    if name == "write":
        descriptor, data = arguments
        os.write(descriptor, data[: len(data) // 2])
    else:
        call()


class Disk:
    """What of a folder tree would be there after a loss of power: a model of POSIX's promises.

    A file's bytes are certain once the file was synced, a folder's entries once the folder was. `synced()` is the tree
    of what is certain. File systems may also write entries early: `named()` has all entries as they are, and of each
    file only the bytes that are certain.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tree = _Folder.load(root)
        self._open: dict[int, _File] = {}

    def apply(self, name: str, arguments: tuple, result: Any) -> None:
        if name in ("create", "open_lock", "open"):
            folder, leaf = self._parent(arguments[0])
            self._open[result] = folder.live.setdefault(leaf, _File())
        elif name == "write":
            self._open[arguments[0]].live += bytes(arguments[1][:result])
        elif name == "sync":
            file = self._open[arguments[0]]
            file.durable = bytes(file.live)
        elif name == "sync_folder":
            folder = self._at(arguments[0])
            folder.durable = dict(folder.live)
        elif name == "make_folder":
            folder, leaf = self._parent(arguments[0])
            folder.live[leaf] = _Folder()
        elif name == "rename":
            (source, old), (target, new) = map(self._parent, arguments)
            target.live[new] = source.live.pop(old)
        elif name in ("unlink", "remove_folder"):
            folder, leaf = self._parent(arguments[0])
            del folder.live[leaf]
        else:
            assert name == "close", name

    def synced(self, where: Path) -> None:
        self.tree.store(where, early_names=False)

    def named(self, where: Path) -> None:
        self.tree.store(where, early_names=True)

    def _parent(self, path: Path) -> tuple[_Folder, str]:
        return self._at(path.parent), path.name

    def _at(self, path: Path) -> _Folder:
        node: Any = self.tree
        for part in path.relative_to(self.root).parts:
            node = node.live[part]
        return node


class _File:
    def __init__(self, data: bytes = b"") -> None:
        self.live, self.durable = bytearray(data), data


class _Folder:
    def __init__(self) -> None:
        self.live: dict[str, _File | _Folder] = {}
        self.durable: dict[str, _File | _Folder] = {}

    @classmethod
    def load(cls, path: Path) -> _Folder:
        folder = cls()
        for entry in path.iterdir():
            folder.live[entry.name] = cls.load(entry) if entry.is_dir() else _File(entry.read_bytes())
        folder.durable = dict(folder.live)
        return folder

    def store(self, where: Path, early_names: bool) -> None:
        where.mkdir()
        for name, node in (self.live if early_names else self.durable).items():
            if isinstance(node, _File):
                (where / name).write_bytes(node.durable)
            else:
                node.store(where / name, early_names)
