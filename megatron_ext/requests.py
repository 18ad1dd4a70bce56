"""What a run is asked to do beside training: save now, or save and stop.

| asked by | does |
|---|---|
| SIGTERM, SIGUSR1 to any rank; a file `STOP` in the run folder | save and stop |
| a file `SAVE` in the run folder | save and go on |

A request that reached one rank becomes the decision of all at the end of a step, so that they save
the same checkpoint. The files are looked for by the first rank alone (a thousand ranks would ask a
shared file system a thousand times a step), and removed once obeyed.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_ext.launch.noted_signals import noted_signals

STOP_FILE, SAVE_FILE = "STOP", "SAVE"
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Requests:
    """What this rank was asked for so far.

    Args:
        run_dir: where the files may appear.
        reads_files: on the first rank.
        signals: numbers of those that arrived, a list that may grow.
        early: the same, of those that arrived before the run was ready.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        reads_files: bool,
        signals: Sequence[int] = (),
        early: Sequence[int] = (),
    ) -> None:
        self._stop_file, self._save_file = run_dir / STOP_FILE, run_dir / SAVE_FILE
        self._reads_files = reads_files
        self._signals, self._early = signals, early

    @property
    def stop_reason(self) -> str | None:
        """Who asked for the end; None where nobody did."""
        for number in (*self._early, *self._signals):
            return f"signal {signal.Signals(number).name}"
        if self._reads_files and self._stop_file.exists():
            return f"the file {self._stop_file}"
        return None

    @property
    def is_save_wanted(self) -> bool:
        return self._reads_files and self._save_file.exists()

    def note_saved(self) -> None:
        """A checkpoint of now exists."""
        if self._reads_files:
            self._save_file.unlink(missing_ok=True)

    def note_stopped(self) -> None:
        """The same command shall go on."""
        if self._reads_files:
            self._stop_file.unlink(missing_ok=True)


@contextlib.contextmanager
def listening(run_dir: Path, *, reads_files: bool, early: Sequence[int] = ()) -> Iterator[Requests]:
    """Requests that arrive within the block."""
    with noted_signals(_SIGNALS) as received:
        yield Requests(run_dir, reads_files=reads_files, signals=received, early=early)
