"""Cutting the listed files into units: what one worker does between two restart points.

Small files are put together, large .jsonl and plain texts are cut into byte ranges, parquet files
into row groups; a compressed file is read from its beginning and is never cut. The cuts depend on
the listing alone, never on the number of workers, so the result does not either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_ext.data.inputs import Listing, SourceFile, shown
from megatron_ext.data.parquet import RowGroup, read_row_groups
from megatron_ext.data.streams import open_source

_MAX_PARTS = 4096


@dataclass(frozen=True, slots=True)
class Part:
    """A file, or a piece of one.

    Args:
        file: where to read.
        start: first byte; of .parquet the first row group.
        end: byte after the last; of .parquet the row group after the last.
        num_bytes: size on disk, for the progress bar.
        whole: whether no other part reads the same file.
        first_row: of .parquet, the number of the first row in the file.
    """

    file: SourceFile
    start: int
    end: int
    num_bytes: int
    whole: bool
    first_row: int = 0


@dataclass(frozen=True, slots=True)
class Unit:
    """Consecutive parts that are handled at once. Parts of a cut file stand alone."""

    index: int
    parts: tuple[Part, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes on disk, for the progress bar."""
        return sum(part.num_bytes for part in self.parts)

    @property
    def fragment_of(self) -> str | None:
        """The file, if this unit is a piece of a single document that spans several units."""
        part = self.parts[0]
        return part.file.path if part.file.format == "text" and not part.whole else None


def cut_into_units(listing: Listing, *, unit_bytes: int, text_key: str) -> list[Unit]:
    """Units in input order, each of about `unit_bytes` of input.

    Raises:
        UserError: a .parquet file cannot be read (its footer is needed to cut it).
    """
    parts = (part for file in listing.files for part in _cut_file(file, unit_bytes, text_key))
    return [Unit(index, group) for index, group in enumerate(_gather(parts, unit_bytes))]


def group_fragments(units: Iterable[Unit]) -> Iterator[list[Unit]]:
    """Lists of one unit, or of all units that hold pieces of the same document."""
    group: list[Unit] = []
    for unit in units:
        if group and (unit.fragment_of is None or unit.fragment_of != group[-1].fragment_of):
            yield group
            group = []
        group.append(unit)
    if group:
        yield group


def _gather(parts: Iterable[Part], unit_bytes: int) -> Iterator[tuple[Part, ...]]:
    waiting: list[Part] = []
    num_bytes = 0
    for part in parts:
        full = num_bytes + part.num_bytes > unit_bytes or len(waiting) == _MAX_PARTS
        if waiting and (full or not part.whole):
            yield tuple(waiting)
            waiting, num_bytes = [], 0
        waiting.append(part)
        num_bytes += part.num_bytes
        if not part.whole:
            yield tuple(waiting)
            waiting, num_bytes = [], 0
    if waiting:
        yield tuple(waiting)


def _cut_file(file: SourceFile, unit_bytes: int, text_key: str) -> Iterator[Part]:
    if file.format == "parquet":
        yield from _cut_parquet(file, unit_bytes, text_key)
        return
    num_parts = -(-file.num_bytes // unit_bytes) if file.compression == "none" else 1
    if num_parts <= 1:
        yield Part(file, 0, file.num_bytes, file.num_bytes, whole=True)
        return
    for index in range(num_parts):
        start = file.num_bytes * index // num_parts
        end = file.num_bytes * (index + 1) // num_parts
        yield Part(file, start, end, end - start, whole=False)


def _cut_parquet(file: SourceFile, unit_bytes: int, text_key: str) -> Iterator[Part]:
    with open_source(file) as stream:
        groups = read_row_groups(stream, column=text_key, path=shown(file.path))
    parts: list[list[RowGroup]] = []
    for group in groups:
        if not parts or sum(g.num_bytes for g in parts[-1]) + group.num_bytes > unit_bytes:
            parts.append([])
        parts[-1].append(group)
    total = sum(group.num_bytes for group in groups) or 1
    for part in parts:
        # Column sizes are sizes in memory; shares of the file keep the progress bar honest.
        share = file.num_bytes * sum(group.num_bytes for group in part) // total
        start, end = part[0].index, part[-1].index + 1
        yield Part(file, start, end, share, whole=len(parts) == 1, first_row=part[0].first_row)
