"""Loads ``libmoetrain_ops.so`` (built from ``csrc/``), which registers the operators ``torch.ops.moetrain``.

The file is a plain shared library without Python in it: it stands beside this file in an installed wheel,
and in site-packages under an editable install. ``MOETRAIN_OPS_LIBRARY=/path/to.so`` overrides the search.
"""

from __future__ import annotations

import os
import site
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch

from moetrain.errors import DependencyError

LIBRARY_NAME = "libmoetrain_ops.so"

HOW_TO_BUILD = (
    "build it with the torch you run: `pip install --no-build-isolation -e .` in the moetrain checkout "
    "(docs/how-to/extension.md)"
)


class ExtensionError(DependencyError, ImportError):
    """The compiled operators are absent, or were built for another torch."""


class ExtensionInfo(NamedTuple):
    """What is loaded: ``cpu_isa`` is ``amx``, ``avx512``, ``avx2`` or ``base``; ``cuda``: has CUDA kernels."""

    path: Path
    built_with_torch: str
    cpu_isa: str
    cuda: bool


def _candidates() -> list[Path]:
    override = os.environ.get("MOETRAIN_OPS_LIBRARY")
    if override:
        return [Path(override)]
    package = sys.modules[__package__ or "moetrain.ops"]
    sites = [sysconfig.get_path("platlib"), *site.getsitepackages(), *sys.path]
    folders = [Path(p) for p in package.__path__] + [Path(s, "moetrain", "ops") for s in sites]
    return list(dict.fromkeys(folder / LIBRARY_NAME for folder in folders))


def _find() -> Path:
    candidates = _candidates()
    found = [path for path in candidates if path.is_file()]
    if not found:
        tried = "\n  ".join(str(path.parent) for path in candidates)
        raise ExtensionError(f"{LIBRARY_NAME} is not built; {HOW_TO_BUILD}. Looked in:\n  {tried}")
    # An editable install leaves its library in site-packages while an older one may lie in the source tree.
    return max(found, key=lambda path: path.stat().st_mtime)


def _load() -> ExtensionInfo:
    path = _find()
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ExtensionError(
            f"{path} does not load into torch {torch.__version__}: {error}. It was probably built "
            f"with another torch; {HOW_TO_BUILD}"
        ) from error
    built_with, isa, kind = torch.ops.moetrain.build_info().split(";")
    if built_with.split(".")[:2] != torch.__version__.split(".")[:2]:
        # torch's C++ interface changes between minor versions: it may load and be wrong.
        raise ExtensionError(
            f"{path} was built with torch {built_with} and loaded into {torch.__version__}; {HOW_TO_BUILD}"
        )
    return ExtensionInfo(path, built_with, isa, kind == "cuda")


_INFO = _load()


def extension_info() -> ExtensionInfo:
    """Path and build facts of the loaded operators."""
    return _INFO
