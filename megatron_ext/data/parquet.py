"""The one door to pyarrow, which reads .parquet and is an optional part of the install."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from megatron_ext.errors import UserError

# Rows decoded at a time: few, because one row may be a whole book.
_BATCH_ROWS = 128


@dataclass(frozen=True, slots=True)
class RowGroup:
    """One row group: its number, its first row in the file, and its size."""

    index: int
    first_row: int
    num_rows: int
    num_bytes: int


def missing_pyarrow() -> str | None:
    """None where pyarrow can be used, else the reason why not."""
    if importlib.util.find_spec("pyarrow") is None:
        return "pyarrow is not installed: pip install 'megatron-ext[parquet]'"
    return None


def read_row_groups(stream: BinaryIO, *, column: str, path: str) -> list[RowGroup]:
    """The row groups of a file whose column holds strings.

    Raises:
        UserError: pyarrow is missing, the file is damaged, or the column is missing or no text.
    """
    reason = missing_pyarrow()
    if reason:
        raise UserError(f"{path}: {reason}")
    import pyarrow
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(stream)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a parquet file that can be read: {error}") from None
    schema = parquet.schema_arrow
    if column not in schema.names:
        raise UserError(
            f"{path} has no column {column!r}; it has {', '.join(map(repr, schema.names))}. "
            "Choose one with --text-key"
        )
    kind = schema.field(column).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"{path}: column {column!r} holds {kind}, expected strings")
    groups = []
    first_row = 0
    for index in range(parquet.metadata.num_row_groups):
        group = parquet.metadata.row_group(index)
        groups.append(RowGroup(index, first_row, group.num_rows, group.total_byte_size))
        first_row += group.num_rows
    return groups


def read_texts(
    stream: BinaryIO, *, column: str, row_groups: Sequence[int]
) -> Iterator[list[str | None]]:
    """The column's values in these row groups, some rows at a time.

    Raises:
        BrokenParquetError: the file is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(stream, pre_buffer=False)
        batches = parquet.iter_batches(
            batch_size=_BATCH_ROWS, row_groups=row_groups, columns=[column], use_threads=False
        )
        for batch in batches:
            yield batch.column(0).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BrokenParquetError(str(error)) from None


class BrokenParquetError(Exception):
    """A row group that cannot be read."""
