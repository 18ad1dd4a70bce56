"""Where a text may be cut without changing its tokens.

A document of any size is read and tokenised in blocks. A cut after a line end that stands between
two printable ASCII characters is one that the usual word patterns (GPT-2, Llama 3 and their kin)
make anyway, so byte-level BPE gives the same tokens as for the whole text. Where a text has no
such place for 64 KiB, the next best is taken: any line end, a space between words, and at last a
border between two characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO

BLOCK_BYTES = 512 * 1024
WINDOW_BYTES = 64 * 1024
_MAX_CHARACTER_BYTES = 4
_PLACES = (
    re.compile(rb"[!-~]\n(?=[!-~])"),
    re.compile(rb"\n(?=\S)"),
    re.compile(rb"\n"),
    re.compile(rb"[!-~](?= [!-~])"),
)


def find_cut(data: bytes, earliest: int) -> int:
    """The best place to cut `data` at or after `earliest`, at most 64 KiB + 3 bytes after it.

    Args:
        data: UTF-8 text, or part of one.
        earliest: a position inside it, at least 1.
    """
    for place in _PLACES:
        match = place.search(data, earliest - 1, earliest + WINDOW_BYTES)
        if match:
            return match.end()
    cut = earliest
    while cut < min(len(data), earliest + _MAX_CHARACTER_BYTES - 1) and data[cut] & 0xC0 == 0x80:
        cut += 1
    return cut


def find_file_cut(stream: BinaryIO, nominal: int, num_bytes: int) -> int:
    """`find_cut` in a file of `num_bytes` at the nominal position; its ends stay where they are."""
    if nominal <= 0 or nominal >= num_bytes:
        return max(0, min(nominal, num_bytes))
    stream.seek(nominal - 1)
    data = stream.read(WINDOW_BYTES + _MAX_CHARACTER_BYTES + 1)
    return nominal - 1 + find_cut(data, 1)


def iter_blocks(stream: BinaryIO, *, num_bytes: int | None = None) -> Iterator[bytes]:
    """Read up to `num_bytes` (all, if None) as blocks of about `BLOCK_BYTES`, well cut."""
    wanted = BLOCK_BYTES + WINDOW_BYTES + _MAX_CHARACTER_BYTES
    left = num_bytes
    data = b""
    while True:
        chunk = _read_fully(stream, _smaller(wanted - len(data), left))
        left = None if left is None else left - len(chunk)
        data += chunk
        if len(data) < wanted:
            break
        cut = find_cut(data, BLOCK_BYTES)
        yield data[:cut]
        data = data[cut:]
    if data:
        yield data


def cut_points(data: bytes) -> Iterator[tuple[int, int]]:
    """The well cut blocks of a text in memory, as half-open ranges of bytes."""
    start = 0
    while len(data) - start > BLOCK_BYTES + WINDOW_BYTES:
        cut = find_cut(data, start + BLOCK_BYTES)
        yield start, cut
        start = cut
    yield start, len(data)


def _smaller(size: int, left: int | None) -> int:
    return size if left is None else min(size, left)


def _read_fully(stream: BinaryIO, size: int) -> bytes:
    """Exactly `size` bytes unless the stream ends: a decompressor may give fewer at a time."""
    parts = []
    while size > 0:
        part = stream.read(size)
        if not part:
            break
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
