"""Saves and finds the checkpoints of a run. Either a checkpoint is whole and has its name, or it does not exist."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from moetrain.checkpoint import folders
from moetrain.checkpoint.comm import Comm, together
from moetrain.checkpoint.files import OS_FILES, Files
from moetrain.checkpoint.integrity import check_size, check_sum
from moetrain.checkpoint.manifest import Manifest, ShardRecord, merge_records
from moetrain.checkpoint.reader import CheckpointReader
from moetrain.checkpoint.retention import Retention, Survey, ranked
from moetrain.checkpoint.store import Piece, save_shard
from moetrain.errors import CheckpointError

logger = logging.getLogger(__name__)


class CheckpointManager:
    """The checkpoints under one root, which all ranks must see (a shared file system).

    All public methods are collectives over `comm`: every rank calls them with the same arguments (each with its own
    `pieces`) and every rank gets the same result or the same CheckpointError.

    `keep_last`, `keep_every`, `keep_best`: see `Retention`. A save always looks whether its files have their length;
    with `checksum_after_write` it also reads them back. `files` does what is done to the disk.
    """

    def __init__(
        self,
        root: Path | str,
        keep_last: int,
        comm: Comm,
        keep_every: int | None = None,
        keep_best: int = 0,
        checksum_after_write: bool = False,
        files: Files = OS_FILES,
    ) -> None:
        self.root = Path(root)
        self.retention = Retention(keep_last, keep_every, keep_best)
        self.comm = comm
        self.checksum_after_write = checksum_after_write
        self.files = files
        self._survey = Survey()
        #: Bytes in the shard files of the last save, over all ranks.
        self.saved_bytes = 0
        #: Why newer checkpoints were passed over by the last `latest()` or `open()`, newest first.
        self.skipped: list[str] = []

    def folder(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.root / folders.step_name(step)

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
        Once the checkpoint stands, what follows (pointers, deletion of old ones) is told as a warning if it fails.
        """
        target = self.folder(step)
        token = self.comm.broadcast_object(secrets.token_hex(4))
        temporary = self.root / f"{folders.TEMPORARY}{target.name}-{token}"
        with ExitStack() as held:
            with together(self.comm, f"start saving {target}"):
                if self._leads and held.enter_context(folders.exclusive(self.root, self.files)):
                    folders.remove_dead_saves(self.root, self.files)
            self._make_way(target, token)
            try:
                self._write(temporary, target, token, pieces, (step, consumed_samples, config, layout, extra))
            finally:
                if self._leads:
                    folders.discard(temporary, self.files)
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
                aside = folders.set_aside(target, token, self.files)
                logger.warning("moved a damaged checkpoint to %s: %s", aside, reason)

    def _write(self, temporary: Path, target: Path, token: str, pieces: Iterable[Piece], head: tuple) -> None:
        with together(self.comm, f"create {temporary}"):
            if self._leads:
                self.files.make_folder(temporary)
        with together(self.comm, f"write {target}"):
            record = save_shard(temporary, self.comm.rank, pieces, files=self.files)
            self._verify(temporary, record)
        gathered = self.comm.gather_objects(record.to_json())
        with together(self.comm, f"commit {target}"):
            if gathered is not None:
                parts = [ShardRecord.from_json(part, f"rank {rank}") for rank, part in enumerate(gathered)]
                merged = merge_records(parts)
                _require_visible(temporary, merged)
                folders.commit(temporary, target, Manifest(*head, record=merged).to_bytes(), token, self.files)
                self.saved_bytes = sum(file.bytes for file in merged.files.values())
        self.saved_bytes = self.comm.broadcast_object(self.saved_bytes)

    def _verify(self, folder: Path, record: ShardRecord) -> None:
        """Whether what this rank wrote is there: a disk that lies is told from one that does not while the state is
        still in memory."""
        for name, file in record.files.items():
            check_size(folder / name, file.bytes)
            if self.checksum_after_write:
                check_sum(folder / name, file, self.files, from_disk=True)

    def _retire(self, step: int, token: str) -> None:
        """Renew `best`, and delete what no rule keeps of the sound checkpoints up to the one just saved."""
        try:
            saved = self._survey.look(self.root)
        except OSError as error:
            logger.warning("old checkpoints in %s could not be looked through: %s", self.root, error)
            return
        for newer in (one for one in saved if one.step > step):
            logger.warning("%s is newer than the checkpoint just saved (step %d)", newer.folder, step)
        saved = [one for one in saved if one.step <= step]
        if self.retention.best and (best := ranked(saved)):
            folders.point(self.root, folders.BEST, best[0].folder, token, self.files)
        for old in self.retention.doomed(saved, folders.pointed_names(self.root)):
            try:
                folders.remove_checkpoint(old.folder, token, self.files)
            except OSError as error:
                logger.warning("the old checkpoint %s could not be removed: %s", old.folder, error)

    def _tell_skipped(self, reasons: list[str], found: str | None) -> None:
        self.skipped = reasons
        if reasons and found is None:
            raise CheckpointError(f"{self.root}: no usable checkpoint: {'; '.join(reasons)}")
        if self._leads:
            for reason in reasons:
                logger.warning("passed over a damaged checkpoint, using %s instead: %s", found, reason)


def _require_visible(folder: Path, record: ShardRecord) -> None:
    """Rank 0 must see every rank's files: a node-local disk would commit a checkpoint that nobody can load."""
    for name, file in record.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != file.bytes:
            raise CheckpointError(f"rank 0 does not see {path} ({file.bytes} bytes); the root must be on a shared disk")
