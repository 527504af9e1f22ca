"""Saves and finds the checkpoints of a run. Either a checkpoint is whole and has its name, or it does not exist."""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from moetrain.checkpoint import folders
from moetrain.checkpoint.comm import Comm, together
from moetrain.checkpoint.manifest import Manifest, ShardRecord, merge_records
from moetrain.checkpoint.reader import CheckpointReader
from moetrain.checkpoint.store import Piece, save_shard
from moetrain.errors import CheckpointError

logger = logging.getLogger(__name__)


class CheckpointManager:
    """The checkpoints under one root, which all ranks must see (a shared file system).

    All public methods are collectives over `comm`: every rank calls them with the same arguments (each with its own
    `pieces`) and every rank gets the same result or the same CheckpointError.
    """

    def __init__(self, root: Path | str, keep_last: int, comm: Comm) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last ({keep_last}) must be at least 1")
        self.root = Path(root)
        self.keep_last = keep_last
        self.comm = comm
        #: Why newer checkpoints were passed over by the last `latest()` or `open()`, newest first.
        self.skipped: list[str] = []

    def save(
        self,
        step: int,
        consumed_samples: int,
        pieces: Iterable[Piece],
        config: dict[str, Any],
        layout: dict[str, Any],
        extra: dict[str, Any],
    ) -> Path:
        """Write and commit the checkpoint of a step; returns its folder.

        `pieces` may be lazy: an error while producing them is agreed on like any other. On any rank's failure (disk
        full, an element owned by none or by two) all ranks raise CheckpointError, and the folder is as it was.
        A sound checkpoint of the same step is never replaced; a damaged one is set aside under `damaged-...`.
        """
        target = self.root / folders.step_name(step)
        token = self.comm.broadcast_object(secrets.token_hex(4))
        temporary = self.root / f"{folders.TEMPORARY}{target.name}-{token}"
        with ExitStack() as held:
            with together(self.comm, f"start saving {target}"):
                if self._leads and held.enter_context(folders.exclusive(self.root)):
                    folders.remove_dead_saves(self.root)
            self._make_way(target, token)
            try:
                self._write(temporary, target, token, pieces, (step, consumed_samples, config, layout, extra))
            finally:
                if self._leads:
                    shutil.rmtree(temporary, ignore_errors=True)
            with together(self.comm, f"remove old checkpoints in {self.root}"):
                if self._leads:
                    self._retire(step, token)
        return target

    def latest(self) -> Path | None:
        """The newest checkpoint whose files all have their right length; None when there is none at all.

        Damaged ones are passed over and logged; CheckpointError when there are only damaged ones, since starting from
        scratch beside them is for the user to decide.
        """
        found: str | None = None
        reasons: list[str] = []
        with together(self.comm, f"look for checkpoints in {self.root}"):
            if self._leads:
                for _, folder in folders.step_folders(self.root):
                    try:
                        CheckpointReader(folder, verify="size")
                    except CheckpointError as error:
                        reasons.append(str(error))
                    else:
                        found = folder.name
                        break
        found, reasons = self.comm.broadcast_object([found, reasons])
        self._tell_skipped(reasons, found)
        return None if found is None else self.root / found

    def open(self, path: Path | str | None = None) -> CheckpointReader | None:
        """Open the checkpoint that `path` means (see `find_step_folder`), or (None) the newest sound one under the
        root; None when there is none at all under the root.

        Every file's sha256 is checked, each by one rank. A damaged one that `path` means is a CheckpointError; without
        `path` damaged ones are passed over as in `latest`. All ranks are certain to look at the same checkpoint.
        """
        if path is not None:
            folder = Path(path)
            with together(self.comm, f"open {path}"):
                folder = folders.find_step_folder(folder)
            return self._open_verified(folder)
        names: list[str] = []
        with together(self.comm, f"look for checkpoints in {self.root}"):
            if self._leads:
                names = [folder.name for _, folder in folders.step_folders(self.root)]
        reasons: list[str] = []
        for name in self.comm.broadcast_object(names):
            try:
                reader = self._open_verified(self.root / name)
            except CheckpointError as error:
                reasons.append(str(error))
            else:
                self._tell_skipped(reasons, name)
                return reader
        self._tell_skipped(reasons, None)
        return None

    @property
    def _leads(self) -> bool:
        return self.comm.rank == 0

    def _open_verified(self, folder: Path) -> CheckpointReader:
        with together(self.comm, f"open {folder}"):
            reader = CheckpointReader(folder, verify="size")
            reader.verify_files(reader.files()[self.comm.rank :: self.comm.world_size])
        prints = self.comm.gather_objects(reader.manifest.fingerprint())
        with together(self.comm, f"open {folder}"):
            if prints is not None and len(set(prints)) > 1:
                raise CheckpointError("ranks see different checkpoints under this path; it must be on a shared disk")
        return reader

    def _make_way(self, target: Path, token: str) -> None:
        """Refuse to save over a sound checkpoint; set a damaged one aside."""
        taken = False
        with together(self.comm, f"look for {target}"):
            taken = self._leads and target.exists()
        if not self.comm.broadcast_object(taken):
            return
        try:
            self._open_verified(target)
        except CheckpointError as error:
            reason = str(error)
        else:
            raise CheckpointError(f"{target} already is a complete checkpoint; move it away or save another step")
        with together(self.comm, f"set {target} aside"):
            if self._leads:
                aside = folders.set_aside(target, token)
                logger.warning("moved a damaged checkpoint to %s: %s", aside, reason)

    def _write(self, temporary: Path, target: Path, token: str, pieces: Iterable[Piece], head: tuple) -> None:
        with together(self.comm, f"create {temporary}"):
            if self._leads:
                temporary.mkdir()
        with together(self.comm, f"write {target}"):
            record = save_shard(temporary, self.comm.rank, pieces)
        gathered = self.comm.gather_objects(record.to_json())
        with together(self.comm, f"commit {target}"):
            if gathered is not None:
                parts = [ShardRecord.from_json(part, f"rank {rank}") for rank, part in enumerate(gathered)]
                merged = merge_records(parts)
                _require_visible(temporary, merged)
                folders.commit(temporary, target, Manifest(*head, record=merged).to_bytes(), token)

    def _retire(self, step: int, token: str) -> None:
        """Delete sound checkpoints older than the one just saved, but for the newest `keep_last - 1` of them."""
        kept = 1
        for other, folder in folders.step_folders(self.root):
            if other > step:
                logger.warning("%s is newer than the checkpoint just saved (step %d)", folder, step)
            if other >= step or not _is_complete(folder):
                continue
            kept += 1
            if kept > self.keep_last:
                folders.remove_checkpoint(folder, token)

    def _tell_skipped(self, reasons: list[str], found: str | None) -> None:
        self.skipped = reasons
        if reasons and found is None:
            raise CheckpointError(f"{self.root}: no usable checkpoint: {'; '.join(reasons)}")
        if self._leads:
            for reason in reasons:
                logger.warning("passed over a damaged checkpoint, using %s instead: %s", found, reason)


def _is_complete(folder: Path) -> bool:
    try:
        CheckpointReader(folder, verify="size")
    except CheckpointError:
        return False
    return True


def _require_visible(folder: Path, record: ShardRecord) -> None:
    """Rank 0 must see every rank's files: a node-local disk would commit a checkpoint that nobody can load."""
    for name, file in record.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != file.bytes:
            raise CheckpointError(f"rank 0 does not see {path} ({file.bytes} bytes); the root must be on a shared disk")
