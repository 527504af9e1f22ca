"""A progress bar on a terminal, a line now and then in a log file, nothing when nobody asked."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10.0


class Meter:
    """Counts bytes of input done, and tokens made of them, against a known number of bytes.

    Use as a context manager; writes to standard error, so that standard output stays the command's result.
    """

    def __init__(self, label: str, total_bytes: int, enabled: bool = True, console: Console | None = None) -> None:
        self._label = label
        self._total = max(total_bytes, 1)
        self._console = console or Console(stderr=True)
        self._enabled = enabled
        self._bar: Progress | None = None
        self._bytes = self._tokens = 0
        self._start = self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        self._start = self._last_line = time.monotonic()
        if self._enabled and self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console)
            self._bar.start()
            self._bar.add_task(self._label, total=self._total, rate="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._enabled and kind is None:
            self._console.print(f"{self._label}: done, {self.rate()}", highlight=False)

    def advance(self, input_bytes: int, tokens: int = 0) -> None:
        """Count one more piece of work."""
        self._bytes += input_bytes
        self._tokens += tokens
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._bytes, rate=self.rate())
        elif self._enabled and time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            self._console.print(
                f"{self._label}: {self._share():.0%}, {self.rate()}, {self.eta():.0f} s left", highlight=False
            )

    def rate(self) -> str:
        """What was done so far and how fast, in words."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        text = f"{self._bytes / 1e6:.1f} MB in {seconds:.1f} s ({self._bytes / seconds / 1e6:.1f} MB/s"
        return text + (f", {self._tokens / seconds:,.0f} tokens/s)" if self._tokens else ")")

    def eta(self) -> float:
        """Seconds left at the rate so far; infinity before the first byte."""
        elapsed = time.monotonic() - self._start
        return elapsed * (1 - self._share()) / self._share() if self._bytes else float("inf")

    def _share(self) -> float:
        return min(self._bytes / self._total, 1.0)
