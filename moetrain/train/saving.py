"""When a run's saves start and end, what a failed one means, and who is told."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from moetrain.checkpoint.background import BackgroundSaver, SaveOutcome, Snapshot
from moetrain.checkpoint.manager import CheckpointManager
from moetrain.config.schema import CheckpointConfig
from moetrain.errors import CheckpointError
from moetrain.train.metrics import SaveReport

_PATIENCE = 60.0  # seconds for a save in flight when the run dies; launchers give a dying rank about as long


class RunSaver:
    """The saves of one run. All methods but `rescue` are collectives: the ranks see the same saves end the same way at
    the same points, so they agree on what is told and on when to give up.

    `tell` is called with every save that is over, failed ones included.
    """

    def __init__(
        self,
        manager: CheckpointManager,
        config: CheckpointConfig,
        log: logging.Logger,
        tell: Callable[[SaveReport], None],
    ) -> None:
        self._saver = BackgroundSaver(manager)
        self._config, self._log, self._tell = config, log, tell
        self._failed_in_a_row = 0
        #: The step that is saved, or being saved.
        self.saved_at: int | None = None

    @property
    def is_over(self) -> bool:
        """Nothing is being written by this rank. Local."""
        return self._saver.is_over

    def save(self, snapshot: Snapshot) -> None:
        """Save the state of now. On return training may go on; its next update only after `wait_until_copied`. Waits
        for the save before, so there is one at a time.

        Raises:
            CheckpointError: this makes `checkpoint.max_failed_saves` failures in a row.
        """
        if self.saved_at == snapshot.step:
            return
        begin = time.perf_counter()
        self.settle()
        self.saved_at = snapshot.step
        if self._config.async_save:
            self._saver.start(snapshot, waited=time.perf_counter() - begin)
        else:
            self._conclude(self._saver.save(snapshot))

    def wait_until_copied(self) -> None:
        """Before the optimizer's update: until the save in flight, if any, needs the state no more. Local."""
        self._saver.wait_until_copied()

    def settle(self) -> None:
        """Wait for the save in flight, if any, and tell how it ended. Raises as `save`."""
        if not self._saver.is_idle:
            outcome = self._saver.collect()
            assert outcome is not None
            self._conclude(outcome)

    def save_last(self, snapshot: Snapshot) -> None:
        """Leave a committed checkpoint of this step behind: that of the save in flight, or one made now.

        Raises:
            CheckpointError: there is none; nobody would try again.
        """
        self.settle()
        if self.saved_at == snapshot.step:
            return
        outcome = self._saver.save(snapshot)
        self._report(outcome)
        if outcome.error is not None:
            raise outcome.error

    def rescue(self) -> None:
        """The run dies: give the save in flight a while. Nothing is raised."""
        if self._saver.is_idle:
            return
        self._log.info("waiting up to %.0f s for the save in flight", _PATIENCE)
        try:
            outcome = self._saver.collect(_PATIENCE)
        except Exception as error:  # peers may be gone; the run's own error is the one to tell
            self._log.error("the save in flight failed: %s", error)
            return
        if outcome is None:
            self._log.error("the save in flight was given up; what it wrote is removed by the next save")
        elif outcome.error is None:
            self._log.info("saved %s", outcome.path)
        else:
            self._log.error("%s", outcome.error)

    def _conclude(self, outcome: SaveOutcome) -> None:
        self._report(outcome)
        if outcome.error is None:
            return
        limit = self._config.max_failed_saves
        if self._failed_in_a_row >= limit:
            raise CheckpointError(
                f"{limit} saves in a row failed (checkpoint.max_failed_saves), the last at iteration {outcome.step}: "
                f"{outcome.error}"
            ) from outcome.error

    def _report(self, outcome: SaveOutcome) -> None:
        failed = outcome.error is not None
        self._failed_in_a_row = self._failed_in_a_row + 1 if failed else 0
        self.saved_at = None if failed else outcome.step
        if failed:
            self._log.error("no checkpoint of iteration %d: %s", outcome.step, outcome.error)
        self._tell(
            SaveReport(
                iteration=outcome.step,
                path=outcome.path,
                error=None if outcome.error is None else str(outcome.error),
                stall_seconds=outcome.stall_seconds,
                write_seconds=outcome.write_seconds,
                nbytes=outcome.nbytes,
                failed_in_a_row=self._failed_in_a_row,
            )
        )
