"""How far the work is: a bar on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_LINE_SECONDS = 5.0


class ProgressReport:
    """Tells bytes done, bytes a second and the time left, on stderr.

    Args:
        total_bytes: all of the input.
        done_bytes: what was done before, and does not count for the rate.
        show: False to say nothing.
    """

    def __init__(self, total_bytes: int, *, done_bytes: int, show: bool) -> None:
        self._total_bytes = max(total_bytes, 1)
        self._first_bytes = done_bytes
        self._started = self._last_line = time.monotonic()
        self._show = show
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if show and sys.stderr.isatty():
            self._bar, self._task = _make_bar(self._total_bytes, done_bytes)

    def update(self, done_bytes: int) -> None:
        """Say how many bytes of input are done."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=min(done_bytes, self._total_bytes))
        elif self._show and time.monotonic() - self._last_line >= _LINE_SECONDS:
            self._last_line = time.monotonic()
            self._print_line(done_bytes)

    def close(self) -> None:
        """Stop drawing."""
        if self._bar is not None:
            self._bar.stop()

    def _print_line(self, done_bytes: int) -> None:
        rate = (done_bytes - self._first_bytes) / (time.monotonic() - self._started)
        left = "unknown"
        if rate > 0:
            left = f"{max(0, self._total_bytes - done_bytes) / rate:.0f} s"
        print(
            f"tokenised {done_bytes / 1e6:.1f} of {self._total_bytes / 1e6:.1f} MB "
            f"({done_bytes / self._total_bytes:.0%}), {rate / 1e6:.1f} MB/s, time left {left}",
            file=sys.stderr,
            flush=True,
        )


def say(text: str, *, show: bool) -> None:
    """One line about the work, on stderr."""
    if show:
        print(text, file=sys.stderr, flush=True)


def _make_bar(total_bytes: int, done_bytes: int) -> tuple[Progress, TaskID]:
    from rich import progress
    from rich.console import Console

    bar = progress.Progress(
        progress.TextColumn("tokenising"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TextColumn("time left"),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    task = bar.add_task("tokenising", total=total_bytes, completed=done_bytes)
    bar.start()
    return bar, task
