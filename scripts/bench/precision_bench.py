"""What the parts of `precision.py` share: a place for records that outlives what fails.

Whatever a kernel raises becomes a record, and the next one is tried.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from scripts.bench.kernel_timing import measure
from scripts.bench.precision_report import Record, Status, as_lines

# Rounds of timing are split in as many passes over all sides: clocks change as a GPU gets warm.
_PASSES = 2


@dataclass(frozen=True, slots=True)
class Settings:
    """Where and how long: quick has the same code at sizes of a test."""

    device: str
    is_quick: bool = False

    @property
    def rounds(self) -> int:
        return 2 if self.is_quick else 24


@dataclass(frozen=True, slots=True)
class Side:
    """A way to do one thing. amount: FLOPs or bytes of a call, in units of 1e-12 or 1e-9."""

    kernel: str
    backend: str
    call: Callable[[], Any]
    amount: float
    unit: str
    detail: str = ""


@dataclass(slots=True)
class Bench:
    """Records of one part, each written to `file` (if any) as soon as it is there."""

    settings: Settings
    part: str
    file: Path | None = None
    records: list[Record] = field(default_factory=list)

    @property
    def device(self) -> str:
        return self.settings.device

    def add(
        self,
        kernel: str,
        backend: str,
        case: str,
        status: Status,
        detail: str = "",
        **figures: Any,
    ) -> None:
        record = Record(self.part, kernel, backend, case, status, detail, **figures)
        self.records.append(record)
        if self.file is not None:
            with self.file.open("a") as stream:
                stream.write(as_lines([record]))

    def check(
        self, kernel: str, backend: str, case: str, call: Callable[[], tuple[bool, str]]
    ) -> None:
        """call: whether it is right, and what was compared or differs."""
        try:
            passed, detail = call()
        except Exception as error:
            self.add(kernel, backend, case, "error", in_words(error))
            return
        self.add(kernel, backend, case, "passed" if passed else "failed", detail)

    def prepare(self, kernel: str, backend: str, case: str, make: Callable[[], Any]) -> Any:
        """What `make` returns; None, and a record, where it fails."""
        try:
            return make()
        except Exception as error:
            self.add(kernel, backend, case, "error", in_words(error))
            return None

    def time(self, case: str, sides: list[Side]) -> None:
        """All sides in turn, twice; a record each, in the order of `sides`."""
        times: list[list[float]] = [[] for _ in sides]
        peaks: list[int | None] = [None for _ in sides]
        errors = ["" for _ in sides]
        for _ in range(_PASSES):
            for place, side in enumerate(sides):
                if errors[place]:
                    continue
                try:
                    seconds, peak = self._measured(side.call)
                except Exception as error:
                    errors[place] = in_words(error)
                    continue
                times[place].append(seconds)
                peaks[place] = peak
        for side, found, peak, problem in zip(sides, times, peaks, errors, strict=True):
            if problem:
                self.add(side.kernel, side.backend, case, "error", problem)
                continue
            seconds = sum(found) / len(found)
            self.add(
                side.kernel,
                side.backend,
                case,
                "measured",
                side.detail,
                value=side.amount / seconds,
                unit=side.unit,
                seconds=seconds,
                peak_memory_bytes=peak,
            )

    def _measured(self, call: Callable[[], Any]) -> tuple[float, int | None]:
        """Median seconds of a call, and the most memory that was allocated."""
        rounds = max(1, self.settings.rounds // _PASSES)
        if self.device == "cpu":
            return measure(call, "cpu", rounds), None
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        return measure(call, self.device, rounds), peak


def in_words(error: Exception) -> str:
    """Its kind and first line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else ''}"


def own_backends(device: str) -> tuple[str, ...]:
    """Kernels of this project; the backend's own `why_not` says which can run."""
    return ("triton", "cuda") if device == "cuda" else ("cpu", "triton")
