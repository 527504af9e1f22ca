"""Which step folder a user means by a path."""

from __future__ import annotations

import re
from pathlib import Path

from moetrain.checkpoint.folders import LATEST
from moetrain.checkpoint.manifest import MANIFEST_NAME
from moetrain.errors import ConversionError

_STEP_NAME = re.compile(r"step-\d+")


def find_step_folder(path: Path) -> Path:
    """The committed step folder that `path` is, or that its `latest` or `checkpoints/latest` names.

    ConversionError when there is none, or when `latest` holds anything but the name of a folder beside it.
    """
    if (path / MANIFEST_NAME).is_file():
        return path
    for root in (path, path / "checkpoints"):
        if (root / LATEST).is_file():
            return _named_by(root / LATEST)
    raise ConversionError(
        f"{path} is no checkpoint: expected a step folder (with {MANIFEST_NAME}), a folder of step folders (with "
        f"{LATEST}), or a run folder (with checkpoints/)"
    )


def _named_by(pointer: Path) -> Path:
    # A pointer is short; a damaged or hostile one must neither fill memory nor lead out of its folder.
    with pointer.open("rb") as file:
        name = file.read(100).decode("ascii", "replace").strip()
    if not _STEP_NAME.fullmatch(name):
        raise ConversionError(f"{pointer} holds {name!r}; must be the name of a step folder, such as step-00000010")
    folder = pointer.parent / name
    if not (folder / MANIFEST_NAME).is_file():
        raise ConversionError(f"{pointer} names {name}, which is not a complete checkpoint (it has no {MANIFEST_NAME})")
    return folder
