"""Saves beside training: a thread copies the state, and does what `CheckpointManager.save` does.

A thread and not a process: the copy would have to cross into the process, which would have to import torch anew (eight
seconds), may not be forked from one that uses CUDA, and would need a process group of its own with every other. The
thread's work (hashing, writing, syncing, waiting for peers) runs outside of Python's lock.

Its collectives need a process group that nothing else uses: two threads that share one would mix up their messages.
Every rank starts its saves in the same order, one at a time, so the threads' collectives meet in that order too; and
no thread ever waits for a main thread that waits for it, for a main thread waits for its own save alone, and that for
peers which have reached the save or will, without any help of this rank.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moetrain.checkpoint.manager import CheckpointManager
from moetrain.checkpoint.staging import StagedShare, StagingBuffer
from moetrain.checkpoint.store import Piece
from moetrain.errors import CheckpointError


@dataclass(frozen=True)
class Snapshot:
    """The arguments of `CheckpointManager.save`."""

    step: int
    consumed_samples: int
    pieces: Iterable[Piece]
    config: dict[str, Any]
    layout: dict[str, Any]
    extra: dict[str, Any]


@dataclass(frozen=True)
class SaveOutcome:
    """How a save ended; all but the seconds is the same on every rank.

    `error` is None when `path` is committed. `stall_seconds`: how long training stood still for it, on this rank.
    `write_seconds`: from the copy to the commit. `nbytes`: of the shard files of all ranks.
    """

    step: int
    path: Path
    error: CheckpointError | None
    stall_seconds: float
    write_seconds: float
    nbytes: int


class BackgroundSaver:
    """At most one save at a time, in a thread. Used by one thread; `start` and `collect` are collectives."""

    def __init__(self, manager: CheckpointManager) -> None:
        self.manager = manager
        self.staging = StagingBuffer()
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._result: SaveOutcome | Exception | None = None
        self._stall = 0.0

    @property
    def is_idle(self) -> bool:
        """Nothing was started that has not been collected."""
        return self._thread is None

    @property
    def is_over(self) -> bool:
        """Whether `collect` would return at once. Local: other ranks may still be waiting."""
        return self._thread is None or not self._thread.is_alive()

    def save(self, snapshot: Snapshot) -> SaveOutcome:
        """Save in this thread, from live memory, without a copy."""
        assert self.is_idle, "the save before was not collected"
        outcome = self._save(snapshot, snapshot.pieces)
        return _with_stall(outcome, outcome.write_seconds)

    def start(self, snapshot: Snapshot, waited: float = 0.0) -> None:
        """Copy what is not steady and return; a thread does the rest. Steady pieces may change after
        `wait_until_copied`. `waited`: seconds of stall before this call."""
        assert self.is_idle, "the save before was not collected"
        begin = time.perf_counter()
        try:
            share: StagedShare | Exception = self.staging.stage(snapshot.pieces)
        except Exception as error:
            share = error
        self._result = None
        self._copied.clear()
        # A daemon: a process that dies of something else must not wait for peers that are gone.
        self._thread = threading.Thread(target=self._run, args=(snapshot, share), name="checkpoint", daemon=True)
        self._thread.start()
        self._stall = waited + time.perf_counter() - begin

    def wait_until_copied(self) -> None:
        """To be called before the optimizer's update. Local; returns at once but during the copy of a save."""
        if not self._copied.is_set():
            begin = time.perf_counter()
            self._copied.wait()
            self._stall += time.perf_counter() - begin

    def collect(self, timeout: float | None = None) -> SaveOutcome | None:
        """Wait for the save in the background; None if it takes longer than `timeout` seconds. What is no
        CheckpointError (a peer that is gone) is raised."""
        assert self._thread is not None, "nothing was started"
        self._thread.join(timeout)
        if self._thread.is_alive():
            return None
        self._thread = None
        if isinstance(self._result, Exception):
            raise self._result
        assert self._result is not None, "the thread ended without a word"
        return _with_stall(self._result, self._stall)

    def _run(self, snapshot: Snapshot, share: StagedShare | Exception) -> None:
        pieces = self._pieces(share)
        try:
            self._result = self._save(snapshot, pieces)
        except Exception as error:  # `collect` raises it, in the thread that can do something about it
            self._result = error

    def _pieces(self, share: StagedShare | Exception) -> Iterable[Piece]:
        """The other ranks save, and must be told of an error by the save, or they wait for ever."""
        try:
            if isinstance(share, Exception):
                return _raising(share)
            share.finish()
            return share.pieces
        except Exception as error:
            return _raising(error)
        finally:
            self._copied.set()

    def _save(self, snapshot: Snapshot, pieces: Iterable[Piece]) -> SaveOutcome:
        begin = time.perf_counter()
        failure: CheckpointError | None = None
        path = self.manager.folder(snapshot.step)
        try:
            self.manager.save(
                snapshot.step, snapshot.consumed_samples, pieces, snapshot.config, snapshot.layout, snapshot.extra
            )
        except CheckpointError as error:
            failure = error
        nbytes = 0 if failure else self.manager.saved_bytes
        return SaveOutcome(snapshot.step, path, failure, 0.0, time.perf_counter() - begin, nbytes)


def _with_stall(outcome: SaveOutcome, seconds: float) -> SaveOutcome:
    return replace(outcome, stall_seconds=seconds)


def _raising(error: Exception) -> Iterator[Piece]:
    raise error
    yield  # a generator, so that it raises where the pieces are asked for
