"""Being asked to stop: SIGTERM, SIGUSR1 or a `STOP` file in the run folder.

A request on any rank becomes the decision of all ranks at the end of a step, so that all of them
save the same checkpoint.
"""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Listens until `close`. `reason` says who asked first, or is None."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / "STOP"
        self._signal: int | None = None
        self._before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    @property
    def reason(self) -> str | None:
        if self._signal is not None:
            return f"signal {signal.Signals(self._signal).name}"
        if self._file.exists():
            return f"the file {self._file}"
        return None

    def close(self) -> None:
        """Give the signals back; an obeyed STOP file is removed by `clear`."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def clear(self) -> None:
        """Remove the STOP file, so that the same command goes on."""
        self._file.unlink(missing_ok=True)
