"""How far a long command is: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich import progress
from rich.console import Console

LINE_SECONDS = 10.0


class Progress:
    """Counts pieces of work. Use as a context manager; writes to standard error.

    The time left assumes that the rest takes as long as what was done; pieces differ, so it is rough.
    """

    def __init__(self, label: str, total: int, enabled: bool, console: Console | None = None) -> None:
        self._label, self._total, self._enabled = label, total, enabled
        self._console = console or Console(stderr=True)
        self._bar: progress.Progress | None = None
        self._done = 0
        self._start = self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        if self._enabled and self._console.is_terminal:
            columns = (
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[left]}"),
            )
            self._bar = progress.Progress(*columns, console=self._console)
            self._bar.start()
            self._bar.add_task(self._label, total=self._total, left="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, what: str) -> None:
        """One more piece is done: `what`."""
        self._done += 1
        left = f"about {self.seconds_left():.0f} s left"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done, description=what, left=left)
        elif self._enabled and (time.monotonic() - self._last_line >= LINE_SECONDS or self._done == self._total):
            self._last_line = time.monotonic()
            text = f"{self._label}: {self._done}/{self._total}, {what}, {left}"
            self._console.print(text, highlight=False, soft_wrap=True)

    def seconds_left(self) -> float:
        """At the pace so far; call after the first piece."""
        return (time.monotonic() - self._start) / self._done * (self._total - self._done)
