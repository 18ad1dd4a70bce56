"""From a part of a file to documents, as a stream of events that never holds a whole document.

A document arrives as one or more `Piece`s of about half a MiB. What cannot be read as text
arrives as a `BadRecord`, which also takes back the pieces of the document it interrupts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Literal

from megatron_ext.data.cut import cut_points, find_file_cut, iter_blocks
from megatron_ext.data.inputs import BINARY_PROBE_BYTES, shown
from megatron_ext.data.parquet import BrokenParquetError, read_texts
from megatron_ext.data.streams import STREAM_ERRORS, decompress, open_source
from megatron_ext.data.units import Part

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of a document, its size in UTF-8, and whether the document ends with it."""

    text: str
    num_bytes: int
    ends_document: bool


@dataclass(frozen=True, slots=True)
class BadRecord:
    """What could not be read as text.

    Args:
        file: its name.
        line: line in the file, from 1 (of .parquet the row); in a piece of a file that was cut,
            from the piece's beginning until `lines_before` is added.
        byte_offset: of the first byte that is not UTF-8, in the (decompressed) file.
        reason: what was found and what was expected.
    """

    file: str
    line: int
    byte_offset: int | None
    reason: str

    def shifted(self, lines_before: int) -> BadRecord:
        """The same with its line counted from the beginning of the file."""
        return replace(self, line=self.line + lines_before)

    def __str__(self) -> str:
        at = "" if self.byte_offset is None else f", byte {self.byte_offset}"
        return f"{self.file}, line {self.line}{at}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Skipped:
    """A document without text, or a file that is none."""

    reason: Literal["empty", "binary"]


@dataclass(frozen=True, slots=True)
class EndOfPart:
    """The last event of a part: how many line ends it holds (0 where lines need no shift)."""

    num_lines: int


Event = Piece | BadRecord | Skipped | EndOfPart
Advance = Callable[[int], None]


def read_part(
    part: Part, *, text_key: str, max_record_bytes: int, advance: Advance
) -> Iterator[Event]:
    """Read the documents of a part.

    Args:
        part: what to read.
        text_key: key or column of the text.
        max_record_bytes: longer lines are bad records.
        advance: is told how many bytes on disk have been read of the part so far.

    Raises:
        UserError: the file went away or changed since it was listed.
    """
    with open_source(part.file) as raw:
        if part.file.format == "parquet":
            yield from _read_parquet(raw, part, text_key, advance)
        elif part.file.format == "jsonl":
            yield from _read_jsonl(raw, part, text_key, max_record_bytes, advance)
        else:
            yield from _read_text(raw, part, advance)
    advance(part.num_bytes)


def _read_text(raw: BinaryIO, part: Part, advance: Advance) -> Iterator[Event]:
    if part.file.num_bytes == 0:
        yield Skipped("empty")
        return
    if part.file.compression != "none":
        yield from _read_text_stream(raw, part, advance)
        return
    if b"\0" in raw.read(BINARY_PROBE_BYTES):
        yield Skipped("binary")
        return
    start = find_file_cut(raw, part.start, part.file.num_bytes)
    end = find_file_cut(raw, part.end, part.file.num_bytes)
    raw.seek(start)
    blocks = iter_blocks(raw, num_bytes=end - start)
    yield from _decode_blocks(blocks, part, start, advance)


def _read_text_stream(raw: BinaryIO, part: Part, advance: Advance) -> Iterator[Event]:
    blocks = iter_blocks(decompress(raw, part.file))
    try:
        first = next(blocks, b"")
        if not first:
            yield Skipped("empty")
        elif b"\0" in first[:BINARY_PROBE_BYTES]:
            yield Skipped("binary")
        else:
            rest = _chain(first, blocks)
            yield from _decode_blocks(rest, part, 0, lambda _: advance(raw.tell()))
    except STREAM_ERRORS as error:
        yield BadRecord(shown(part.file.path), 1, None, f"damaged {part.file.compression}: {error}")


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


def _decode_blocks(
    blocks: Iterator[bytes], part: Part, start: int, advance: Advance
) -> Iterator[Event]:
    """Blocks of one document; each is handed on when it is known whether it is the last."""
    num_lines = 0
    done = 0
    held: Piece | None = None
    for block in blocks:
        try:
            text = block.decode()
        except UnicodeDecodeError as error:
            line = num_lines + block.count(b"\n", 0, error.start) + 1
            yield _bad_utf8(part, line, start + done + error.start, block[error.start])
            # The rest of a fragment still counts its lines, for the fragments after it.
            num_lines += block.count(b"\n") + sum(rest.count(b"\n") for rest in blocks)
            held = None
            break
        num_lines += block.count(b"\n")
        done += len(block)
        advance(done)
        if held is not None:
            yield held
        held = Piece(text, len(block), ends_document=False)
    if held is not None:
        yield replace(held, ends_document=True)
    yield EndOfPart(num_lines)


def _bad_utf8(part: Part, line: int, offset: int, byte: int) -> BadRecord:
    return BadRecord(shown(part.file.path), line, offset, f"not UTF-8 (byte 0x{byte:02x})")


def _read_jsonl(
    raw: BinaryIO, part: Part, text_key: str, max_record_bytes: int, advance: Advance
) -> Iterator[Event]:
    stream = decompress(raw, part.file)
    compressed = stream is not raw
    position = _first_line(raw, part.start) if not compressed else 0
    num_lines = 0
    while compressed or position < part.end:
        try:
            line = stream.readline(max_record_bytes + 1)
            too_long = len(line) > max_record_bytes
            length = len(line) + (_skip_line(stream) if too_long and line[-1:] != b"\n" else 0)
        except STREAM_ERRORS as error:
            reason = f"damaged {part.file.compression} after line {num_lines}: {error}"
            yield BadRecord(shown(part.file.path), num_lines + 1, None, reason)
            break
        if not line:
            break
        num_lines += 1
        if too_long:
            reason = f"longer than --max-record-bytes {max_record_bytes}"
            yield BadRecord(shown(part.file.path), num_lines, None, reason)
        elif not line.isspace():
            if position == 0:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            yield from _parse_line(line, part, num_lines, position, text_key)
        position += length
        advance(raw.tell() if compressed else min(position, part.end) - part.start)
    yield EndOfPart(num_lines)


def _first_line(stream: BinaryIO, start: int) -> int:
    """Position of the first line that begins at or after `start`; the stream stands there."""
    if start == 0:
        return 0
    stream.seek(start - 1)
    return start - 1 + _skip_line(stream)


def _skip_line(stream: BinaryIO) -> int:
    """Read up to the next line end without keeping it; the number of bytes read."""
    skipped = 0
    while True:
        part = stream.readline(1 << 20)
        skipped += len(part)
        if not part or part.endswith(b"\n"):
            return skipped


def _parse_line(
    line: bytes, part: Part, number: int, position: int, text_key: str
) -> Iterator[Event]:
    path = shown(part.file.path)
    try:
        decoded = line.decode()
    except UnicodeDecodeError as error:
        yield _bad_utf8(part, number, position + error.start, line[error.start])
        return
    try:
        record = json.loads(decoded)
    except json.JSONDecodeError as error:
        found = error.msg.removesuffix(" at")
        yield BadRecord(path, number, None, f"not JSON: {found} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        yield BadRecord(path, number, None, f"not JSON: {error}")
    else:
        yield from _record_events(record, path, number, text_key)


def _record_events(record: Any, path: str, number: int, text_key: str) -> Iterator[Event]:
    if not isinstance(record, dict):
        reason = f"expected a JSON object with the key {text_key!r}, found {_kind(record)}"
        yield BadRecord(path, number, None, reason)
    elif text_key not in record:
        keys = ", ".join(ascii(key) for key in list(record)[:8]) or "none"
        yield BadRecord(path, number, None, f"no key {text_key!r}; it has {keys}")
    else:
        yield from _text_events(record[text_key], path, number, text_key)


def _text_events(text: Any, path: str, number: int, text_key: str) -> Iterator[Event]:
    if not isinstance(text, str):
        yield BadRecord(path, number, None, f"{text_key!r} holds {_kind(text)}, expected a string")
        return
    if not text:
        yield Skipped("empty")
        return
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        yield BadRecord(path, number, None, f"lone surrogate at character {error.start}")
        return
    for start, end in cut_points(data):
        whole = end - start == len(data)
        piece = text if whole else data[start:end].decode()
        yield Piece(piece, end - start, ends_document=end == len(data))


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _read_parquet(raw: BinaryIO, part: Part, text_key: str, advance: Advance) -> Iterator[Event]:
    path = shown(part.file.path)
    row = part.first_row
    num_groups = part.end - part.start
    for done, group in enumerate(range(part.start, part.end)):
        try:
            for texts in read_texts(raw, column=text_key, row_groups=[group]):
                for text in texts:
                    row += 1
                    yield from _text_events(text, path, row, text_key)
        except BrokenParquetError as error:
            yield BadRecord(path, row + 1, None, f"damaged row group {group}: {error}")
        advance(part.num_bytes * (done + 1) // num_groups)
