"""A folder that appears whole or not at all, and whose making can be killed and go on.

It grows beside its place under a hidden name. A journal in it says what is being made and which files are finished,
with their sizes and sums, so that nothing is taken on trust when somebody goes on.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moetrain.convert.safetensors_file import parse_json
from moetrain.convert.weight_file import WrittenFile, sha256_of
from moetrain.errors import ConversionError, MoetrainError

JOURNAL, LOCK = "journal.json", ".lock"


class Draft:
    """The hidden folder: `finished` files stay when the work is killed."""

    def __init__(self, folder: Path, identity: dict[str, Any], files: dict[str, WrittenFile]) -> None:
        self.folder = folder
        self._identity = identity
        self.finished = files

    def record(self, name: str, written: WrittenFile) -> None:
        """`name` is on disk, whole."""
        self.finished[name] = written
        self.save()

    def save(self) -> None:
        """Replace the journal in one step."""
        files = {name: {"bytes": f.bytes, "sha256": f.sha256} for name, f in self.finished.items()}
        temporary = self.folder / f"{JOURNAL}.new"
        temporary.write_text(json.dumps({"making": self._identity, "files": files}, indent=1), encoding="utf-8")
        temporary.replace(self.folder / JOURNAL)


def draft_of(out: Path) -> Path:
    """Where `out` grows."""
    return out.absolute().parent / f".{out.name}.partial"


@contextmanager
def growing_folder(out: Path, identity: dict[str, Any]) -> Iterator[Draft]:
    """The draft of `out`, with the files that an earlier attempt at the same finished. Becomes `out` at the end.

    `identity` (plain JSON) says what is being made; an attempt at something else is refused. After an error of
    ours nothing stays; after anything else, a full disk say, finished files do.
    """
    draft = draft_of(out)
    if draft.is_symlink() or (draft.exists() and not draft.is_dir()):
        raise ConversionError(f"{draft} is in the way: no folder; delete it")
    draft.mkdir(parents=True, exist_ok=True)
    with _locked(draft):
        state = Draft(draft, identity, _finished_files(draft, identity))
        state.save()
        try:
            yield state
            (draft / JOURNAL).unlink()
            (draft / LOCK).unlink(missing_ok=True)
            draft.replace(out)
        except MoetrainError:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        except OSError as error:
            if not state.finished:
                shutil.rmtree(draft, ignore_errors=True)
                raise ConversionError(f"writing {out} failed: {error}; nothing was left") from error
            raise ConversionError(
                f"writing {out} failed: {error}; {draft} keeps {len(state.finished)} finished file(s): repeat the "
                "command to go on, or delete it"
            ) from error


def _finished_files(draft: Path, identity: dict[str, Any]) -> dict[str, WrittenFile]:
    """Files of an earlier attempt that are as its journal says. Everything else in the draft is deleted."""
    there = {path.name for path in draft.iterdir()} - {LOCK}
    if JOURNAL not in there:
        if there - {f"{JOURNAL}.new"}:
            raise ConversionError(f"{draft} is not empty and no unfinished export; nothing in it is touched: move it")
        return {}
    journal = parse_json((draft / JOURNAL).read_bytes(), str(draft / JOURNAL))
    _require_same(draft, journal.get("making"), identity)
    finished = {}
    with suppress(AttributeError, TypeError, KeyError):  # a damaged journal: then nothing is finished
        for name, file in journal["files"].items():
            written = WrittenFile(file["bytes"], file["sha256"])
            if name in there and _is_whole(draft / name, written):
                finished[name] = written
    for name in there - finished.keys() - {JOURNAL}:
        path = draft / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return finished


def _require_same(draft: Path, before: Any, now: dict[str, Any]) -> None:
    if before == now:
        return
    known = before if isinstance(before, dict) else {}
    different = [key for key, value in now.items() if known.get(key) != value]
    told = "; ".join(f"{key}: {known.get(key)} there, {now[key]} now" for key in different)
    raise ConversionError(
        f"{draft} is an unfinished export of something else ({told}); repeat the command that began it, or delete it"
    )


def _is_whole(path: Path, written: WrittenFile) -> bool:
    if path.is_symlink() or not path.is_file() or path.stat().st_size != written.bytes:
        return False
    return sha256_of(path) == written.sha256


@contextmanager
def _locked(draft: Path) -> Iterator[None]:
    """ConversionError when another process is writing there. The kernel drops the lock when we die."""
    with (draft / LOCK).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConversionError(f"{draft}: another process is exporting there") from None
        yield
