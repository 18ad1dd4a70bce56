"""All units, tokenised on all cores: what is finished stays, what is not is handed to workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ext.data.bad_records import describe_stop, gather_bad_records, write_bad_records
from megatron_ext.data.progress import ProgressReport, say
from megatron_ext.data.settings import PrepareSettings
from megatron_ext.data.unit_writer import (
    UnitContext,
    UnitSummary,
    build_unit_job,
    read_summary,
    unit_folder,
)
from megatron_ext.data.units import Unit
from megatron_ext.data.workers import WorkerPool, shared_counters
from megatron_ext.data.workplace import BAD_RECORDS_FILE, Workplace
from megatron_ext.errors import UserError

_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class TokenisedUnits:
    """All units, finished.

    Args:
        summaries: by unit index.
        num_resumed_bytes: bytes of input that an earlier run had done.
        peak_worker_bytes: largest resident memory of one worker of this run.
    """

    summaries: Mapping[int, UnitSummary]
    num_resumed_bytes: int
    peak_worker_bytes: int


def tokenise_units(
    settings: PrepareSettings, place: Workplace, units: Sequence[Unit], *, show: bool
) -> TokenisedUnits:
    """Finish all units.

    Raises:
        UserError: there are bad records and the policy is to stop, a file changed, the disk is
            full, or a worker died.
    """
    run = _Run(settings, place, units)
    resumed = run.resumed_bytes()
    if resumed:
        say(f"going on: {resumed / 1e6:.1f} MB of the input were done before", show=show)
    run.finish(resumed, show=show)
    return TokenisedUnits(run.summaries, resumed, run.peak_worker_bytes)


class _Run:
    def __init__(self, settings: PrepareSettings, place: Workplace, units: Sequence[Unit]) -> None:
        self.summaries: dict[int, UnitSummary] = {}
        self.peak_worker_bytes = 0
        self._settings = settings
        self._place = place
        self._units = units
        # With the policy `stop`, the first unit with a bad record: those after it are not begun.
        self._last = len(units)
        for unit in units:
            self._take_summary(unit.index)

    def resumed_bytes(self) -> int:
        return sum(unit.num_bytes for unit in self._units if unit.index in self.summaries)

    def finish(self, resumed: int, *, show: bool) -> None:
        pending = deque(unit for unit in self._units if unit.index not in self.summaries)
        if pending:
            self._run_workers(pending, resumed, show=show)
        if self._last < len(self._units):
            self._stop()
        assert len(self.summaries) == len(self._units), "a unit was not finished"

    def _run_workers(self, pending: deque[Unit], resumed: int, *, show: bool) -> None:
        settings, place = self._settings, self._place
        counters = shared_counters(len(self._units))
        context = UnitContext(
            units_folder=place.units_folder,
            tokenizer_folder=place.tokenizer_folder,
            text_key=settings.text_key,
            max_record_bytes=settings.max_record_bytes,
            progress=counters,
        )
        done = np.frombuffer(counters, np.int64)
        total = sum(unit.num_bytes for unit in self._units)
        progress = ProgressReport(total, done_bytes=resumed, show=show)
        try:
            with WorkerPool(
                num_workers=min(settings.worker_count(), len(pending)),
                build=build_unit_job,
                setup=context,
                # One process a core: threads inside them would only get in each other's way.
                environment={"TOKENIZERS_PARALLELISM": "false"},
            ) as pool:
                while self._feed(pool, pending):
                    for index in pool.wait(_POLL_SECONDS):
                        self._take_summary(index)
                    progress.update(resumed + int(done.sum()))
            self.peak_worker_bytes = pool.peak_bytes
        finally:
            progress.close()

    def _feed(self, pool: WorkerPool, pending: deque[Unit]) -> bool:
        """Give work to idle workers; whether any is at work."""
        while pool.num_idle and pending and pending[0].index <= self._last:
            pool.submit(pending.popleft())
        return pool.num_busy > 0

    def _take_summary(self, index: int) -> None:
        folder = unit_folder(self._place.units_folder, index)
        summary = read_summary(folder)
        if summary is None:
            return
        self.summaries[index] = summary
        if summary.num_bad_stopping and self._settings.bad_records == "stop":
            self._last = min(self._last, index)

    def _stop(self) -> None:
        """Report the bad records up to the last unit; all units before it are finished."""
        units = self._units[: self._last + 1]
        path = self._place.output / BAD_RECORDS_FILE
        records = gather_bad_records(units, self.summaries, self._place.units_folder)
        raise UserError(describe_stop(write_bad_records(path, units, records), path))
