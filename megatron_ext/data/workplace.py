"""The output folder while a corpus is being made in it, and after.

    DIR/metadata.json           written last: without it there is no corpus
    DIR/tokenizer/              made once, before the first unit
    DIR/train.*, validation.*   put in place just before metadata.json
    DIR/bad_records.jsonl       if there are any
    DIR/.prepare/               while the work goes on: manifest, lock, finished units

The manifest holds all that decides the result: the settings and the input files with their sizes
and times. The same command finds the same manifest and goes on; another one is refused, because
its units would not fit those that are there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_ext.data.disk import write_json
from megatron_ext.data.inputs import PYTHON_STDLIB, Listing
from megatron_ext.data.settings import PrepareSettings
from megatron_ext.errors import UserError

FORMAT_VERSION = 1
METADATA_FILE = "metadata.json"
TOKENIZER_FOLDER = "tokenizer"
BAD_RECORDS_FILE = "bad_records.jsonl"
WORK_FOLDER = ".prepare"
SPLITS = ("train", "validation")
SPLIT_SUFFIXES = (".bin", ".idx", ".documents.npy")
_CHOICES = (
    "Give the same inputs and options as before to go on, choose another --output, or throw the "
    "old work away with --overwrite"
)

Manifest = dict[str, Any]


def make_manifest(
    settings: PrepareSettings, listing: Listing, *, tokenizer: str, unit_bytes: int
) -> Manifest:
    """All that decides the result.

    Args:
        settings: what was asked for.
        listing: the files.
        tokenizer: a given tokenizer's fingerprint, or how one is trained.
        unit_bytes: size of a unit.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in listing.files:
        line = (file.path, file.format, file.compression, file.num_bytes, file.mtime_ns)
        digest.update(json.dumps(line).encode() + b"\n")
    return {
        "format_version": FORMAT_VERSION,
        "settings": {
            "inputs": [_absolute(text) for text in settings.inputs],
            "include": list(settings.include),
            "text_key": settings.text_key,
            "validation_fraction": settings.validation_fraction,
            "tokenizer": tokenizer,
            "unit_bytes": unit_bytes,
            "max_record_bytes": settings.max_record_bytes,
        },
        "input_files": {
            "num_files": len(listing.files),
            "num_bytes": listing.num_bytes,
            "digest": digest.hexdigest(),
        },
    }


def _absolute(text: str) -> str:
    return text if text == PYTHON_STDLIB else str(Path(text).resolve())


class PreparationUnderWay(UserError):
    """Another process prepares the same folder now."""


class Workplace:
    """The output folder, held by one preparation at a time.

    Args:
        output: the folder.

    Raises:
        UserError: it cannot be made.
        PreparationUnderWay: another preparation works in it.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output / WORK_FOLDER
        self.units_folder = self.folder / "units"
        self.merge_folder = self.folder / "merge"
        self.tokenizer_folder = output / TOKENIZER_FOLDER
        _refuse_foreign(output)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UserError(f"--output {output}: cannot be made ({error.strerror})") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise PreparationUnderWay(
                f"another preparation is at work in {output}. Wait for it, or end it first"
            ) from None
        except OSError:
            pass  # a file system without locks: go without

    def __enter__(self) -> Workplace:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._lock)
        if self.folder.exists() and os.listdir(self.folder) == ["lock"]:
            shutil.rmtree(self.folder)

    def begin(self, manifest: Manifest, *, overwrite: bool) -> None:
        """Go on with this manifest's work or start it.

        Raises:
            UserError: other work is here and `overwrite` is false.
        """
        path = self.folder / "manifest.json"
        found = _read_json(path)
        if found != manifest:
            finished = _read_json(self.output / METADATA_FILE)
            old = found or (finished and _manifest_of(finished))
            if old and not overwrite:
                raise UserError(
                    f"{self.output} holds another preparation, with {_difference(old, manifest)}. "
                    f"{_CHOICES}"
                )
            self._clear()
            write_json(path, manifest)
        self.units_folder.mkdir(exist_ok=True)
        for leftover in self.units_folder.glob("*.tmp"):
            shutil.rmtree(leftover)
        shutil.rmtree(self.merge_folder, ignore_errors=True)

    def remove_work(self) -> None:
        """Remove what only the preparation needed."""
        shutil.rmtree(self.folder)

    def _clear(self) -> None:
        """Remove all that a preparation makes, metadata.json first, and nothing else."""
        names = [METADATA_FILE, BAD_RECORDS_FILE]
        names += [split + suffix for split in SPLITS for suffix in SPLIT_SUFFIXES]
        for name in names:
            (self.output / name).unlink(missing_ok=True)
        (self.folder / "manifest.json").unlink(missing_ok=True)
        for folder in (self.tokenizer_folder, self.units_folder):
            if folder.exists():
                shutil.rmtree(folder)


def find_finished(output: Path, manifest: Manifest) -> dict[str, Any] | None:
    """metadata.json of a corpus that this manifest made, else None."""
    metadata = _read_json(output / METADATA_FILE)
    return metadata if metadata and _manifest_of(metadata) == manifest else None


def _refuse_foreign(output: Path) -> None:
    try:
        names = set(os.listdir(output))
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror}") from None
    if names and not names & {METADATA_FILE, WORK_FOLDER}:
        raise UserError(
            f"--output {output} is not empty and holds no prepared corpus. Choose a new folder"
        )


def _manifest_of(metadata: dict[str, Any]) -> Manifest:
    return {key: metadata.get(key) for key in ("format_version", "settings", "input_files")}


def _difference(old: Manifest, new: Manifest) -> str:
    if old.get("format_version") != new["format_version"]:
        return f"format version {old.get('format_version')} instead of {new['format_version']}"
    before, now = old.get("settings") or {}, new["settings"]
    for key, value in now.items():
        if before.get(key) != value:
            return f"{key} = {before.get(key)!r} instead of {value!r}"
    before, now = old.get("input_files") or {}, new["input_files"]
    return (
        f"other input files: {before.get('num_files')} of {before.get('num_bytes')} bytes then, "
        f"{now['num_files']} of {now['num_bytes']} bytes now"
        + (", of which some were changed" if before.get("num_bytes") == now["num_bytes"] else "")
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        tree = json.loads(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) else None
