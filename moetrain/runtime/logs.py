"""Log files: one per rank in the run folder, and rank 0 on the terminal."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moetrain.errors import ConfigError

# Megatron-core warns at import about each optional library that is absent; `moetrain doctor` tells that in one table.
_EXPECTED_WARNINGS = (
    ".*Transformer Engine.*",
    ".*Apex is not installed.*",
    ".*full scope is deprecated.*",
    ".*CUDA_DEVICE_MAX_CONNECTIONS.*",
    ".*(reduce_scatter|all_gather_into)_tensor.*deprecated.*",
)
_QUIET = ("megatron", "DeepSpeed", "torch.distributed", "filelock")


def quiet_imports() -> None:
    """Call before Megatron is imported: hides the warnings that every machine without optional libraries would show."""
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def writing_into(run_dir: Path) -> Iterator[None]:
    """What the disk refuses in this block becomes a ConfigError about `run.dir`."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"run.dir {run_dir}: cannot write {error.filename} ({error.strerror})") from error


def configure_logs(run_dir: Path, rank: int) -> logging.Logger:
    """The rank's logger: `<run_dir>/logs/rank-<n>.log` always, standard error on rank 0.

    Other libraries' chatter below ERROR and their warnings go to the file only. Raises ConfigError where the folder
    cannot be written.
    """
    with writing_into(run_dir):
        folder = run_dir / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        to_file = logging.FileHandler(folder / f"rank-{rank}.log", encoding="utf-8")
    log = logging.getLogger("moetrain")
    log.setLevel(logging.INFO)
    log.propagate = False
    for old in list(log.handlers):
        log.removeHandler(old)
        old.close()
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    log.addHandler(to_file)
    if rank == 0:
        to_terminal = logging.StreamHandler(sys.stderr)
        to_terminal.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(to_terminal)
    logging.captureWarnings(True)
    warnings_log = logging.getLogger("py.warnings")
    warnings_log.propagate = False
    warnings_log.handlers = [to_file]
    return log
