"""Bad records of many units, as one report with lines counted from the beginning of each file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from megatron_ext.data.inputs import shown
from megatron_ext.data.records import BadRecord
from megatron_ext.data.unit_writer import BAD_RECORDS_FILE, UnitSummary, unit_folder
from megatron_ext.data.units import Unit, group_fragments

_NUM_SHOWN = 5


def gather_bad_records(
    units: Sequence[Unit], summaries: Mapping[int, UnitSummary], units_folder: Path
) -> Iterator[BadRecord]:
    """Bad records in input order; of a document in several pieces only the first.

    Args:
        units: units from the first one on, all of them finished.
        summaries: by unit index.
        units_folder: where the units lie.
    """
    lines_before = 0
    previous = ""
    for group in group_fragments(units):
        in_pieces = group[0].fragment_of is not None
        found = False
        for unit in group:
            part = unit.parts[0]
            lines_before = lines_before if not part.whole and part.file.path == previous else 0
            previous = part.file.path
            if summaries[unit.index].num_bad and not (in_pieces and found):
                found = True
                # Rows of .parquet are numbered from the file's beginning already.
                shift = 0 if part.whole or part.file.format == "parquet" else lines_before
                records = _read_records(unit_folder(units_folder, unit.index))
                for record in islice(records, 1 if in_pieces else None):
                    yield record.shifted(shift)
            lines_before += summaries[unit.index].num_lines


@dataclass(frozen=True, slots=True)
class BadReport:
    """What was written to bad_records.jsonl.

    Args:
        num_bad: all bad records.
        num_stopping: those of files where a bad record is a reason to stop.
        first: the first few of these.
    """

    num_bad: int
    num_stopping: int
    first: tuple[BadRecord, ...]


def write_bad_records(path: Path, units: Iterable[Unit], records: Iterable[BadRecord]) -> BadReport:
    """Write one JSON object a line; no file where there are none."""
    tolerated = {
        shown(part.file.path) for unit in units for part in unit.parts if part.file.skip_bad
    }
    first: list[BadRecord] = []
    num_bad = num_stopping = 0
    path.unlink(missing_ok=True)
    with ExitStack() as stack:
        stream = None
        for record in records:
            stream = stream or stack.enter_context(open(path, "w", encoding="ascii"))
            stream.write(json.dumps(asdict(record)) + "\n")
            num_bad += 1
            if record.file not in tolerated:
                num_stopping += 1
                first += [record] if len(first) < _NUM_SHOWN else []
    return BadReport(num_bad, num_stopping, tuple(first))


def describe_stop(report: BadReport, path: Path) -> str:
    """The message for `--bad-records stop`."""
    lines = [str(record) for record in report.first]
    if report.num_stopping > len(lines):
        lines.append(f"... and {report.num_stopping - len(lines)} more")
    noun = "record" if report.num_stopping == 1 else "records"
    return (
        f"{report.num_stopping} bad {noun} so far, listed in {path}:\n  "
        + "\n  ".join(lines)
        + "\nTo leave bad records out and go on, give --bad-records skip. After a change to an "
        "input file start again with --overwrite"
    )


def _read_records(folder: Path) -> Iterator[BadRecord]:
    with open(folder / BAD_RECORDS_FILE, encoding="ascii") as stream:
        for line in stream:
            yield BadRecord(**json.loads(line))
