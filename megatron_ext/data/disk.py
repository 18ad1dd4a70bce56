"""Writing so that a kill, a crash or a full disk leaves the old state or the new one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_ext.errors import UserError

KEPT_UNITS = "Finished work is kept: make room, then run the same command again"
COPY_BYTES = 8 * 1024**2
# No space, quota reached, or a file larger than the file system or `ulimit -f` allows.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_json(path: Path, tree: Any) -> None:
    """Write JSON so that the old file or the new one is there, never half of one."""
    write_text(path, json.dumps(tree, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text under a temporary name, flush it to the disk, rename it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in the folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_and_close(stream: BinaryIO) -> None:
    """Flush a file to the disk, then close it."""
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()


def copy_stream(source: BinaryIO, target: BinaryIO) -> None:
    """Copy the rest of a file in blocks."""
    while block := source.read(COPY_BYTES):
        target.write(block)


@contextlib.contextmanager
def explain_full_disk(folder: Path, kept: str) -> Iterator[None]:
    """Turn "no space left" into a message that says where, and what has been kept.

    Args:
        folder: what lies on the disk that may be full.
        kept: what is not lost and how to go on.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        text = f"the disk that holds {folder} is full ({error.strerror}). {kept}"
        raise UserError(text) from None
