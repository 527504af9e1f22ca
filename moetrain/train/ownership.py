"""A run folder belongs to one run: two at once would mix their checkpoints and lose each other's metrics."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from moetrain.checkpoint.folders import LOCK, exclusive
from moetrain.errors import CheckpointError

_PATIENCE = 120.0  # seconds; a file server gives up the lock of a node that died after about 90


@contextmanager
def sole_run(run_dir: Path, log: logging.Logger, patience: float = _PATIENCE) -> Iterator[None]:
    """Hold `<run_dir>/.lock`, waiting for a run that is just ending. One rank, around all that writes into the folder.

    The kernel drops the lock when this process dies. Where the file system has no locks, this only warns.

    Raises:
        CheckpointError: another run still holds it after `patience` seconds.
    """
    deadline = time.monotonic() + patience
    with ExitStack() as held:
        waiting = False
        while True:
            try:
                held.enter_context(exclusive(run_dir))
                break
            except CheckpointError:
                if time.monotonic() >= deadline:
                    raise CheckpointError(
                        f"run.dir {run_dir}: another run is going on in this folder (it holds {run_dir / LOCK}); end "
                        "that run, or choose another run.dir"
                    ) from None
            if not waiting:
                log.info("another run is going on in %s; waiting up to %.0f s for its end", run_dir, patience)
                waiting = True
            time.sleep(0.5)
        yield
