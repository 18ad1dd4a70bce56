"""Tokens on disk in megatron's format, and the lengths of the documents beside them.

`NAME.bin` holds the ids of all documents, one after the other. `NAME.idx`, little-endian:

    9 bytes   magic MMIDIDX 0 0
    uint64    version, 1
    uint8     type of the ids: 8 = uint16, 4 = int32
    uint64    number of sequences n
    uint64    number of document borders, n + 1
    int32     n lengths in ids
    int64     n positions in .bin, in bytes
    int64     n + 1 document borders, 0..n

One sequence is one document and ends with the end-of-document id, so megatron's `IndexedDataset`
reads it as it is. `NAME.documents.npy` has a row a document: `num_tokens` (without the end) and
`num_bytes` of its UTF-8 text, which bits per byte needs.

Every size that a header claims is checked against the size of the file before anything is mapped.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_ext.data.disk import copy_stream, sync_and_close
from megatron_ext.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
MAX_DOCUMENT_TOKENS = 2**31 - 1  # a length is an int32
DOCUMENT = np.dtype([("num_tokens", "<i8"), ("num_bytes", "<i8")])
_CODES: dict[str, int] = {"uint16": 8, "int32": 4}
_DTYPES: dict[int, npt.DTypeLike] = {8: np.dtype("<u2"), 4: np.dtype("<i4")}
_CURE = "It is damaged or incomplete: restore it, or prepare the corpus again with --overwrite"
_BORDERS_AT_ONCE = 1 << 20

Int32s = npt.NDArray[np.int32]
Int64s = npt.NDArray[np.int64]


def split_files(prefix: Path) -> tuple[Path, Path, Path]:
    """The .bin, .idx and .documents.npy of a prefix."""
    bin_path, idx_path, documents_path = (
        prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx", ".documents.npy")
    )
    return bin_path, idx_path, documents_path


class IndexedWriter:
    """Writes one token file front to back, in memory that does not depend on its size.

    Args:
        prefix: path without suffix; parts that are needed once wait beside it.
        dtype: uint16 or int32.

    Attributes:
        num_documents: documents added.
        num_tokens: their stored ids, each document's end included.
        num_bytes: UTF-8 bytes of their texts.
    """

    def __init__(self, prefix: Path, dtype: npt.DTypeLike) -> None:
        self.num_documents = 0
        self.num_tokens = 0
        self.num_bytes = 0
        self._prefix = prefix
        self._dtype = np.dtype(dtype)
        self._digest = hashlib.blake2b(digest_size=16)
        self._bin_path, self._idx_path, self._documents_path = split_files(prefix)
        self._part_paths = [
            prefix.with_name(f"{prefix.name}.{part}.part") for part in ("lengths", "starts", "rows")
        ]
        with ExitStack() as stack:
            paths = [self._bin_path, *self._part_paths]
            streams = [stack.enter_context(open(path, "wb")) for path in paths]
            self._bin, self._lengths, self._starts, self._rows = streams
            self._files = stack.pop_all()

    def close(self) -> None:
        """Close the files; before `finish` this leaves them incomplete."""
        self._files.close()

    def write_ids(self, data: bytes | memoryview) -> None:
        """Append stored ids to .bin; `add_documents` says how they are cut."""
        self._bin.write(data)
        self._digest.update(data)

    def add_documents(self, num_tokens: Int64s, num_bytes: Int64s) -> None:
        """Append documents.

        Args:
            num_tokens: ids of each, without the end-of-document id that is stored after them.
            num_bytes: UTF-8 bytes of each.
        """
        lengths = num_tokens + 1
        assert len(lengths) == 0 or int(lengths.max()) <= MAX_DOCUMENT_TOKENS
        starts = self.num_tokens + np.cumsum(lengths) - lengths
        rows = np.empty(len(lengths), DOCUMENT)
        rows["num_tokens"], rows["num_bytes"] = num_tokens, num_bytes
        self._lengths.write(lengths.astype("<i4").tobytes())
        self._starts.write((starts * self._dtype.itemsize).astype("<i8").tobytes())
        self._rows.write(rows.tobytes())
        self._digest.update(rows.tobytes())
        self.num_documents += len(lengths)
        self.num_tokens += int(lengths.sum())
        self.num_bytes += int(num_bytes.sum())

    def finish(self) -> str:
        """Write .idx and .documents.npy; the fingerprint of the content."""
        stored = self._bin.tell() // self._dtype.itemsize
        assert stored == self.num_tokens, "ids and documents do not fit"
        sync_and_close(self._bin)
        self.close()
        lengths, starts, rows = self._part_paths
        with open(self._idx_path, "wb") as stream:
            count = self.num_documents
            code = _CODES[self._dtype.name]
            stream.write(HEADER.pack(MAGIC, 1, code, count, count + 1))
            _append_file(stream, lengths)
            _append_file(stream, starts)
            for first in range(0, count + 1, _BORDERS_AT_ONCE):
                borders = np.arange(first, min(first + _BORDERS_AT_ONCE, count + 1))
                stream.write(borders.astype("<i8").tobytes())
            sync_and_close(stream)
        with open(self._documents_path, "wb") as stream:
            header = {"descr": DOCUMENT.descr, "fortran_order": False, "shape": (count,)}
            np.lib.format.write_array_header_2_0(stream, header)
            _append_file(stream, rows)
            sync_and_close(stream)
        return self._digest.hexdigest()


def _append_file(target: BinaryIO, path: Path) -> None:
    with open(path, "rb") as source:
        copy_stream(source, target)
    path.unlink()


class TokenFile:
    """The documents of one split, mapped and not loaded.

    Args:
        prefix: path without suffix.

    Attributes:
        num_documents: documents.
        num_tokens: stored ids, each document's end included.
        document_lengths: stored ids of each document, [num_documents].

    Raises:
        UserError: a file is missing, damaged, or does not fit the others.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        bin_path, idx_path, documents_path = split_files(self.prefix)
        self._bin_path = bin_path
        dtype, count = _read_header(idx_path)
        self.num_documents = count
        lengths = _map(idx_path, "<i4", HEADER.size, count)
        starts = _map(idx_path, "<i8", HEADER.size + 4 * count, count)
        borders = _map(idx_path, "<i8", HEADER.size + 12 * count, count + 1)
        self.document_lengths: Int32s = lengths
        self._starts: Int64s = starts
        itemsize = np.dtype(dtype).itemsize
        end = int(starts[-1]) + int(lengths[-1]) * itemsize if count else 0
        if int(borders[0]) != 0 or int(borders[-1]) != count or end < 0:
            raise UserError(f"{idx_path}: its documents do not fit its {count} sequences. {_CURE}")
        _expect_size(bin_path, end, f"the end of the last document in {idx_path.name}")
        self._ids = _map(bin_path, dtype, 0, end // itemsize)
        self.num_tokens = end // itemsize
        self._itemsize = itemsize
        self._rows = _map_documents(documents_path, count)

    @property
    def document_bytes(self) -> Int64s:
        """UTF-8 bytes of each document's text, [num_documents]."""
        return self._rows["num_bytes"]

    def read(self, document: int, start: int = 0, end: int | None = None) -> npt.NDArray[Any]:
        """Stored ids `start` to `end` of a document, the last of which is its end: a view.

        Raises:
            IndexError: the document has no such range.
            UserError: the file was damaged after it was opened.
        """
        if not 0 <= document < self.num_documents:
            raise IndexError(f"document {document} of {self.num_documents} in {self.prefix}")
        length = int(self.document_lengths[document])
        end = length if end is None else end
        if not 0 <= start <= end <= length:
            raise IndexError(f"ids {start} to {end} of document {document}, which has {length}")
        first = int(self._starts[document]) // self._itemsize + start
        ids = self._ids[first : first + end - start] if first >= 0 else self._ids[:0]
        if len(ids) != end - start:
            raise UserError(
                f"{self._bin_path}: document {document} should lie at id {first - start}, beyond "
                f"the {len(self._ids)} there are. {_CURE}"
            )
        return ids

    def documents(self) -> Iterator[npt.NDArray[Any]]:
        """All documents in their order."""
        return (self.read(document) for document in range(self.num_documents))


def _read_header(path: Path) -> tuple[npt.DTypeLike, int]:
    size = _file_size(path)
    if size < HEADER.size:
        raise UserError(
            f"{path}: expected a header of {HEADER.size} bytes, found {size} bytes. {_CURE}"
        )
    with open(path, "rb") as stream:
        magic, version, code, count, num_borders = HEADER.unpack(stream.read(HEADER.size))
    if magic != MAGIC:
        raise UserError(f"{path}: expected to begin with {MAGIC!r}, found {magic!r}. {_CURE}")
    if version != 1 or code not in _DTYPES:
        raise UserError(
            f"{path}: expected version 1 and ids of type 8 (uint16) or 4 (int32), found version "
            f"{version} and type {code}. {_CURE}"
        )
    if num_borders != count + 1:
        raise UserError(
            f"{path}: expected {count + 1} document borders for {count} sequences (a document "
            f"each), found {num_borders}. {_CURE}"
        )
    expected = HEADER.size + 4 * count + 8 * count + 8 * num_borders
    _expect_size(path, expected, f"the {count} documents of its header")
    return _DTYPES[code], count


def _map_documents(path: Path, count: int) -> npt.NDArray[Any]:
    size = _file_size(path)
    with open(path, "rb") as stream:
        try:
            version = np.lib.format.read_magic(stream)
            if version != (2, 0):
                raise ValueError(f"format version {version}")
            shape, _, dtype = np.lib.format.read_array_header_2_0(stream)
        except ValueError as error:
            raise UserError(f"{path}: not a .npy file ({error}). {_CURE}") from None
        offset = stream.tell()
    if dtype != DOCUMENT or shape != (count,):
        raise UserError(
            f"{path}: expected {count} rows of {DOCUMENT.names}, found shape {shape} of {dtype}. "
            f"{_CURE}"
        )
    expected = offset + count * DOCUMENT.itemsize
    if size != expected:
        raise UserError(f"{path}: expected {expected} bytes, found {size} bytes. {_CURE}")
    return _map(path, DOCUMENT, offset, count)


def _expect_size(path: Path, expected: int, reason: str) -> None:
    size = _file_size(path)
    if size != expected:
        raise UserError(
            f"{path}: expected {expected} bytes ({reason}), found {size} bytes. {_CURE}"
        )


def _file_size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        raise UserError(f"{path} is missing. {_CURE}") from None


def _map(path: Path, dtype: npt.DTypeLike, offset: int, count: int) -> npt.NDArray[Any]:
    if count == 0:
        return np.empty(0, dtype)
    # As a plain array: slices of a np.memmap cost several times as much.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,)))
