"""Checkpoint folders of a run: names, the tracker, what may be trusted, what is removed.

    RUN/checkpoints/iter_0000100/        complete, because it has this name
    RUN/checkpoints/.iter_0000200.tmp/   being written, or left by a run that died
    RUN/latest_checkpointed_iteration.txt

A folder is renamed to its name when every file in it is on disk, and the tracker is written after
that; so a crash at any moment leaves the older checkpoint in place. `manifest.json` holds the size
and SHA-256 of every file: a flipped bit loads silently otherwise.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.errors import UserError

_NAME = re.compile(r"iter_(\d{7,})\Z")
MANIFEST = "manifest.json"
TRACKER = "latest_checkpointed_iteration.txt"


def checkpoints_dir(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return checkpoints_dir(run_dir) / f"iter_{step:07d}"


def temporary_path(run_dir: Path, step: int) -> Path:
    return checkpoints_dir(run_dir) / f".iter_{step:07d}.tmp"


def complete_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every finished checkpoint, oldest first."""
    folder = checkpoints_dir(run_dir)
    if not folder.is_dir():
        return []
    found = [
        (int(match.group(1)), entry)
        for entry in folder.iterdir()
        if (match := _NAME.match(entry.name)) and entry.is_dir()
    ]
    return sorted(found)


def start_temporary(run_dir: Path, step: int) -> Path:
    """An empty folder to write a checkpoint in."""
    path = temporary_path(run_dir, step)
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    return path


def finish(run_dir: Path, step: int) -> Path:
    """Give the written folder its name, then move the tracker."""
    temporary, final = temporary_path(run_dir, step), checkpoint_path(run_dir, step)
    if final.exists():
        # The same step saved again, e.g. at the end and by a signal.
        shutil.rmtree(final)
    for file in temporary.iterdir():
        _fsync(file)
    fsync_dir(temporary)
    temporary.rename(final)
    fsync_dir(final.parent)
    write_atomically(run_dir / TRACKER, f"{step}\n")
    return final


def remove_old(run_dir: Path, *, keep: int, newest_step: int) -> list[Path]:
    """Remove all but `keep` checkpoints up to `newest_step`, and what dead runs left half-written.

    Later ones do not count: a run that went on from an older checkpoint did so because they are
    damaged, and must not lose a good one for them.
    """
    removed = []
    good = [path for step, path in complete_checkpoints(run_dir) if step <= newest_step]
    for path in good[:-keep]:
        # The newest is safe already; what cannot be removed is no reason to end a run.
        shutil.rmtree(path, ignore_errors=True)
        removed.append(path)
    for leftover in checkpoints_dir(run_dir).glob(".iter_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    return removed


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old text or the new one, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    fsync_dir(path.parent)


def fsync_dir(path: Path) -> None:
    """Put the names in a folder on disk."""
    # Some network file systems cannot sync a folder; the rename itself still holds.
    with contextlib.suppress(OSError):
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digest(path: Path) -> dict[str, int | str]:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def write_manifest(folder: Path, digests: dict[str, dict[str, int | str]]) -> None:
    write_atomically(folder / MANIFEST, json.dumps({"files": digests}, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, dict[str, int | str]]:
    """File name -> size and checksum.

    Raises:
        UserError: the manifest is missing or not ours, or names a path outside the folder.
    """
    path = folder / MANIFEST
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        assert isinstance(files, dict)
    except FileNotFoundError:
        raise UserError(f"{path}: missing, so {folder.name} is not a complete checkpoint") from None
    except (ValueError, KeyError, AssertionError, OSError) as error:
        raise UserError(f"{path}: damaged ({error}); use an older checkpoint") from None
    for name in files:
        if Path(name).name != name:
            raise UserError(f"{path}: names {name!r}, which is not a file of this folder")
    return files


def damaged_files(folder: Path, names: Sequence[str]) -> list[str]:
    """What is wrong with the named files of a checkpoint, one line each; empty when all is well."""
    manifest = read_manifest(folder)
    problems = []
    for name in names:
        expected, path = manifest[name], folder / name
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif path.stat().st_size != expected["bytes"]:
            problems.append(
                f"{path}: {path.stat().st_size:,} bytes, expected {expected['bytes']:,} "
                "(cut short or overwritten)"
            )
        elif file_digest(path)["sha256"] != expected["sha256"]:
            problems.append(f"{path}: content differs from what was saved (SHA-256)")
    return problems
