"""Which libraries with a faster Adam are installed, told by their files.

Nothing is imported, so a stranger under a known name never runs.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal

Apex = Literal["absent", "impostor", "without kernels", "usable"]


def find_apex() -> Apex:
    """What is installed under the name `apex`.

    NVIDIA's, built from source, has apex/optimizers/fused_adam.py and the compiled module amp_C; PyPI's `apex` is a web
    add-on of 2013.
    """
    folders = package_folders("apex")
    if not folders:
        return "absent"
    if not any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        return "impostor"
    return "usable" if importlib.util.find_spec("amp_C") is not None else "without kernels"


def cpu_adam_is_built() -> bool:
    """Whether DeepSpeed was installed with its CPU Adam compiled (DS_BUILD_CPU_ADAM=1), so that no run compiles it."""
    return any(
        path.suffix == ".so"
        for folder in package_folders("deepspeed")
        for path in (folder / "ops" / "adam").glob("cpu_adam_op*")
    )


def package_folders(name: str) -> list[Path]:
    """Where a top-level package lies, without importing it; empty when it is not installed."""
    spec = importlib.util.find_spec(name)
    return [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
