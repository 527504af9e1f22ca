"""Which software made a checkpoint."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import moetrain

_PACKAGES = ("torch", "megatron-core", "deepspeed")


@cache
def software_versions() -> dict[str, str]:
    """Of Python, moetrain and what it stands on, by name; a package that is not installed is left out."""
    found = {"moetrain": moetrain.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
