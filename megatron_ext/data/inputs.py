"""What there is to read: named files, folder trees, and Python's own standard library.

A listing is made before any text is read, in an order that does not depend on the file system:
the inputs as they were named, each folder's entries sorted by their bytes. In a folder hidden
entries, symbolic links and everything that is not a regular file are passed over and counted, so
no link leads out of the tree and nobody reads a device by accident. A file that is named is
expected to be text: if it is missing, empty or binary, that is an error.
"""

from __future__ import annotations

import fnmatch
import itertools
import os
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_ext.data.settings import PrepareSettings
from megatron_ext.errors import UserError

PYTHON_STDLIB = "python-stdlib"
BINARY_PROBE_BYTES = 8192
_STDLIB_FOREIGN = frozenset({"site-packages", "dist-packages", "__pycache__"})
_COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
_JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
# `.json.gz` and `.json.zst` hold a record a line in the corpora that use them (C4, Dolma); a
# plain `.json` is a text like another.
_COMPRESSED_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".md": "text",
}

Format = Literal["text", "jsonl", "parquet"]
Compression = Literal["none", "gzip", "zstd"]


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file to read, as it was when the listing was made.

    Args:
        path: absolute path.
        format: one document (`text`), a record a line (`jsonl`), or a table (`parquet`).
        compression: of the whole file.
        num_bytes: size on disk.
        mtime_ns: time of the last change.
        skip_bad: bad records in it are never a reason to stop (python-stdlib: some of its tests
            are meant to be unreadable).
    """

    path: str
    format: Format
    compression: Compression
    num_bytes: int
    mtime_ns: int
    skip_bad: bool = False


@dataclass(frozen=True, slots=True)
class Listing:
    """The files, in order, and how many entries of folders were passed over, by reason."""

    files: tuple[SourceFile, ...]
    passed_over: dict[str, int]

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return sum(file.num_bytes for file in self.files)


def list_inputs(settings: PrepareSettings) -> Listing:
    """Find every file to read.

    Raises:
        UserError: an input is missing, unreadable, empty, binary, or part of another one, or
            nothing is left to read.
    """
    files: list[SourceFile] = []
    passed_over: Counter[str] = Counter()
    roots = [_root(text) for text in settings.inputs]
    _refuse_overlap(settings.inputs, roots)
    output = settings.output.absolute().resolve()
    for text, root in zip(settings.inputs, roots, strict=True):
        if text == PYTHON_STDLIB:
            found = list(_stdlib_files(root, passed_over))
        elif root.is_dir():
            found = list(_tree_files(root, output, settings.include, passed_over))
        else:
            found = [_named_file(root)]
        if not found:
            raise UserError(f"--input {text}: no file to read in it{_reasons(passed_over)}")
        files += found
    return Listing(tuple(files), dict(sorted(passed_over.items())))


def shown(path: str) -> str:
    """A path that can be printed whatever bytes it has."""
    return os.fsencode(path).decode("utf-8", "replace")


def _root(text: str) -> Path:
    if text == PYTHON_STDLIB:
        return Path(sysconfig.get_path("stdlib")).resolve()
    try:
        root = Path(text).resolve(strict=True)
    except FileNotFoundError:
        hint = " (is it a pattern that the shell did not expand?)" if "*" in text else ""
        raise UserError(f"--input {shown(text)}: no such file or folder{hint}") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"--input {shown(text)}: {error}") from None
    return root


def _refuse_overlap(names: tuple[str, ...], roots: list[Path]) -> None:
    order = sorted(range(len(roots)), key=lambda i: roots[i].parts)
    for first, second in itertools.pairwise(order):
        if roots[second].is_relative_to(roots[first]):
            raise UserError(
                f"--input {shown(names[second])} is part of --input {shown(names[first])}: its "
                "text would be read twice. Name it once; to see a corpus more often, prepare it "
                "alone and give it a larger weight in the run"
            )


def _reasons(passed_over: Counter[str]) -> str:
    found = ", ".join(f"{count} {reason}" for reason, count in sorted(passed_over.items()))
    return f"; passed over: {found}" if found else " (it is empty)"


def _named_file(path: Path) -> SourceFile:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{shown(str(path))} is not a regular file (a device, pipe or socket)")
    if status.st_size == 0:
        raise UserError(f"{shown(str(path))} is empty (0 bytes)")
    file = _source_file(str(path), status)
    if file.format == "text" and file.compression == "none":
        try:
            with open(path, "rb") as stream:
                probe = stream.read(BINARY_PROBE_BYTES)
        except OSError as error:
            raise UserError(f"cannot read {shown(str(path))}: {error.strerror}") from None
        if b"\0" in probe:
            raise UserError(
                f"{shown(str(path))} looks binary: a zero byte at offset {probe.index(0)}. "
                "Expected text in UTF-8, .jsonl (.gz, .zst) or .parquet"
            )
    return file


def _source_file(path: str, status: os.stat_result, *, skip_bad: bool = False) -> SourceFile:
    form, compression = _classify(path)
    return SourceFile(path, form, compression, status.st_size, status.st_mtime_ns, skip_bad)


def _classify(path: str) -> tuple[Format, Compression]:
    stem, suffix = os.path.splitext(path.lower())
    if suffix == ".parquet":
        return "parquet", "none"
    if suffix in _JSONL_SUFFIXES:
        return "jsonl", "none"
    inner = os.path.splitext(stem)[1]
    if suffix in _COMPRESSIONS and inner in _COMPRESSED_FORMATS:
        return _COMPRESSED_FORMATS[inner], _COMPRESSIONS[suffix]
    return "text", "none"


def _stdlib_files(root: Path, passed_over: Counter[str]) -> Iterator[SourceFile]:
    for entry in _walk(root, passed_over, skip_folders=_STDLIB_FOREIGN):
        if entry.name.endswith(".py"):
            yield _source_file(entry.path, _status(entry), skip_bad=True)


def _tree_files(
    root: Path, output: Path, include: tuple[str, ...], passed_over: Counter[str]
) -> Iterator[SourceFile]:
    for entry in _walk(root, passed_over, skip_path=str(output)):
        if include and not _matches(entry, root, include):
            passed_over["not included"] += 1
            continue
        yield _source_file(entry.path, _status(entry))


def _status(entry: os.DirEntry[str]) -> os.stat_result:
    try:
        return entry.stat(follow_symlinks=False)
    except OSError as error:
        raise UserError(f"cannot read {shown(entry.path)}: {error.strerror}") from None


def _matches(entry: os.DirEntry[str], root: Path, include: tuple[str, ...]) -> bool:
    relative = os.path.relpath(entry.path, root)
    return any(
        fnmatch.fnmatchcase(relative if "/" in glob else entry.name, glob) for glob in include
    )


def _walk(
    root: Path,
    passed_over: Counter[str],
    *,
    skip_folders: frozenset[str] = frozenset(),
    skip_path: str = "",
) -> Iterator[os.DirEntry[str]]:
    """Regular files below `root`, folders and files in one sorted order."""
    waiting = [_entries(str(root))]
    while waiting:
        entry = next(waiting[-1], None)
        if entry is None:
            waiting.pop()
        elif entry.name.startswith("."):
            passed_over["hidden"] += 1
        elif entry.is_symlink():
            passed_over["symbolic links"] += 1
        elif entry.is_dir(follow_symlinks=False):
            if entry.name not in skip_folders and entry.path != skip_path:
                waiting.append(_entries(entry.path))
        elif entry.is_file(follow_symlinks=False):
            yield entry
        else:
            passed_over["devices, pipes and sockets"] += 1


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return iter(sorted(entries, key=lambda entry: os.fsencode(entry.name)))
    except OSError as error:
        raise UserError(f"cannot read the folder {shown(folder)}: {error.strerror}") from None
