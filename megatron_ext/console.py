"""What a person sees while a run goes on: a header once, then a line every few steps."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from rich.console import Console

from megatron_ext.metrics import Record, step_of

_COLUMNS = (
    "    step     loss       lr  grad norm   tokens/s  TFLOP/s    MFU   memory  balance      ETA"
)


def duration(seconds: float) -> str:
    """1:05:09, 5:09 or 2d 3h."""
    if not math.isfinite(seconds):
        return "?"
    minutes, whole_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d {hours % 24}h"
    return f"{hours}:{minutes:02}:{whole_seconds:02}" if hours else f"{minutes}:{whole_seconds:02}"


def bytes_text(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:.0f} {unit}" if unit in ("B", "KiB") else f"{number:.2f} {unit}"
        number /= 1024
    raise AssertionError


@dataclass
class TrainConsole:
    """Prints on the first rank only; on a terminal a status line shows the step under way."""

    train_iters: int
    log_interval: int
    enabled: bool

    def __post_init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True, quiet=not self.enabled)
        self._status = self._console.status("starting")
        self._started: float | None = None
        self._first_step = 0

    def say(self, text: str) -> None:
        self._console.print(text, markup=False)

    def begin(self, first_step: int) -> None:
        """Training starts after `first_step` steps already done."""
        self._first_step = first_step
        self._started = time.perf_counter()
        self.say(_COLUMNS)
        if self._console.is_terminal:
            self._status.start()

    def step(self, record: Record) -> None:
        step = step_of(record)
        eta = self._eta_seconds(step)
        if self._console.is_terminal:
            self._status.update(f"step {step}/{self.train_iters}, {duration(eta)} left")
        first = step == self._first_step + 1
        if first or step % self.log_interval == 0 or step == self.train_iters:
            self.say(self._line(record, eta))

    def end(self) -> None:
        self._status.stop()

    def _eta_seconds(self, step: int) -> float:
        done = step - self._first_step
        if self._started is None or done < 1:
            return math.inf
        return (time.perf_counter() - self._started) / done * (self.train_iters - step)

    def _line(self, record: Record, eta_seconds: float) -> str:
        def number(key: str) -> float:
            value = record.get(key)
            return float(value) if isinstance(value, int | float) else math.nan

        return (
            f"{record['step']:>8}  {number('loss'):>7.4f}  {number('learning_rate'):>7.1e}  "
            f"{number('grad_norm'):>9.3f}  {number('tokens_per_second'):>9,.0f}  "
            f"{number('model_tflops'):>7.3g}  {number('mfu'):>5.1%}  "
            f"{bytes_text(number('peak_memory_bytes')):>8}  {number('plan_efficiency'):>6.1%}  "
            f"{duration(eta_seconds):>7}"
        )
