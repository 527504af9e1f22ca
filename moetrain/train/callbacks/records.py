"""JSON that every reader accepts, in files that a crash cannot leave half replaced."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


def to_json(value: Any) -> str:
    """Compact JSON by RFC 8259, which has no NaN or infinity: NaN becomes null, the infinities "Infinity" and
    "-Infinity" as strings."""
    return json.dumps(_legal(value), allow_nan=False)


def replace_file(path: Path, text: str) -> None:
    """Puts `text` in the place of `path`: readers and crashes see the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _legal(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, dict):
        return {key: _legal(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_legal(item) for item in value]
    return value
