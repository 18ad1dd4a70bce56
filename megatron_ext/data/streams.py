"""Opening a listed file for reading: only regular files, unchanged, decompressed as a stream."""

from __future__ import annotations

import gzip
import io
import os
import stat
import zlib
from typing import BinaryIO, cast

from megatron_ext.data.inputs import SourceFile, shown
from megatron_ext.errors import UserError

# Small, because one input chunk is decompressed at once: zstd can blow 4 bytes up to 128 KiB.
_ZSTD_CHUNK_BYTES = 4096


class BrokenStreamError(Exception):
    """A compressed file that is damaged or ends too early."""


# What reading a damaged compressed file may raise, by library.
STREAM_ERRORS = (BrokenStreamError, EOFError, gzip.BadGzipFile, zlib.error)


def open_source(file: SourceFile) -> BinaryIO:
    """Open the bytes on disk.

    Raises:
        UserError: the file went away, cannot be read, or changed since it was listed.
    """
    # No links (the path was resolved before) and no waiting for the other end of a pipe.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(file.path, flags)
    except OSError as error:
        raise UserError(f"cannot read {shown(file.path)}: {error.strerror}") from None
    stream = os.fdopen(descriptor, "rb", buffering=256 * 1024)
    status = os.fstat(descriptor)
    found = (status.st_size, status.st_mtime_ns)
    if not stat.S_ISREG(status.st_mode) or found != (file.num_bytes, file.mtime_ns):
        stream.close()
        raise UserError(
            f"{shown(file.path)} changed while it was being prepared: {file.num_bytes} bytes when "
            f"listed, now {status.st_size}. Let the input be, then start again with --overwrite"
        )
    return stream


def decompress(raw: BinaryIO, file: SourceFile) -> BinaryIO:
    """The content of an opened file. Reading it may raise one of `STREAM_ERRORS`."""
    if file.compression == "gzip":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if file.compression == "zstd":
        return io.BufferedReader(_ZstdStream(raw), 256 * 1024)
    return raw


class _ZstdStream(io.RawIOBase):
    """Zstandard frames one after the other.

    The library's own reader takes the end of a truncated file for the end of the data, which
    would lose records silently; this one says so.
    """

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._errors = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor()
        self._raw = raw
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        while not self._output:
            if not self._advance():
                return 0
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size

    def _advance(self) -> bool:
        """Decompress one chunk more; False at a proper end."""
        rest = b""
        if self._frame is not None and self._frame.eof:
            rest = self._frame.unused_data
            self._frame = None
        data = rest or self._raw.read(_ZSTD_CHUNK_BYTES)
        if not data:
            if self._frame is not None:
                raise BrokenStreamError("the compressed file ends too early")
            return False
        if self._frame is None:
            self._frame = self._decompressor.decompressobj()
        try:
            self._output = memoryview(self._frame.decompress(data))
        except self._errors as error:
            raise BrokenStreamError(str(error)) from None
        return True
