"""A worker's job: read one unit, tokenise it, leave it finished on disk.

A unit becomes a folder: `tokens` (each document's ids, then the end-of-document id), `records`
(one `RECORD` a document), `bad_records.jsonl` if there are any, and `summary.json`. It is written
under a temporary name and renamed when everything has reached the disk, so a folder with its final
name is a finished unit, whatever was killed when. Only numbers travel back to the parent.

Memory is bounded by the batch, not by the document: text is encoded in batches of about 1 MiB and
written at once; a document that turns out bad is cut off the file again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ext.data.disk import KEPT_UNITS, explain_full_disk, sync_folder, write_json
from megatron_ext.data.records import BadRecord, EndOfPart, Piece, Skipped, read_part
from megatron_ext.data.split import split_hash
from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ext.data.units import Unit

TOKENS_FILE = "tokens"
RECORDS_FILE = "records"
BAD_RECORDS_FILE = "bad_records.jsonl"
SUMMARY_FILE = "summary.json"
RECORD = np.dtype([("num_tokens", "<i8"), ("num_bytes", "<i8"), ("split_hash", "<u8")])
_BATCH_CHARACTERS = 1024 * 1024
_BATCH_TEXTS = 4096


@dataclass(frozen=True, slots=True)
class UnitSummary:
    """What the parent needs to know of a finished unit.

    Args:
        num_documents: documents (or pieces of one) in `records`.
        num_token_bytes: size of `tokens`.
        num_bad: lines in `bad_records.jsonl`.
        num_bad_stopping: those of files where a bad record is a reason to stop.
        num_empty: documents without text.
        num_binary: files passed over as binary.
        num_lines: lines of a piece of a file, for the line numbers of the pieces after it.
    """

    num_documents: int = 0
    num_token_bytes: int = 0
    num_bad: int = 0
    num_bad_stopping: int = 0
    num_empty: int = 0
    num_binary: int = 0
    num_lines: int = 0


@dataclass(frozen=True, slots=True)
class UnitContext:
    """What a worker is told once, when it starts."""

    units_folder: Path
    tokenizer_folder: Path
    text_key: str
    max_record_bytes: int
    progress: Any  # shared array of int64: bytes read, by unit


def unit_folder(units_folder: Path, index: int) -> Path:
    """Where the finished unit lies."""
    return units_folder / f"{index:08d}"


def build_unit_job(context: UnitContext) -> Callable[[Unit], int]:
    """The function that a worker calls for each unit; it gives back the unit's index."""
    tokenizer = load_tokenizer(context.tokenizer_folder)

    def job(unit: Unit) -> int:
        with explain_full_disk(context.units_folder, KEPT_UNITS):
            _write_unit(unit, context, tokenizer)
        return unit.index

    return job


def _write_unit(unit: Unit, context: UnitContext, tokenizer: Tokenizer) -> None:
    final = unit_folder(context.units_folder, unit.index)
    folder = final.with_name(f"{final.name}.{os.getpid()}.tmp")
    folder.mkdir(parents=True)
    try:
        with _UnitWriter(folder, tokenizer, ends_documents=unit.fragment_of is None) as writer:
            done = 0
            for part in unit.parts:
                writer.stops = not part.file.skip_bad
                for event in read_part(
                    part,
                    text_key=context.text_key,
                    max_record_bytes=context.max_record_bytes,
                    advance=_reporter(context.progress, unit.index, done),
                ):
                    writer.take(event)
                done += part.num_bytes
        write_json(folder / SUMMARY_FILE, asdict(writer.summary()))
        sync_folder(folder)
        shutil.rmtree(final, ignore_errors=True)  # one that read_summary found damaged
        os.rename(folder, final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_summary(folder: Path) -> UnitSummary | None:
    """The summary of a finished unit; None where the folder or a file in it is not whole."""
    try:
        summary = UnitSummary(**json.loads((folder / SUMMARY_FILE).read_text(encoding="ascii")))
        found = [(folder / name).stat().st_size for name in (TOKENS_FILE, RECORDS_FILE)]
    except (OSError, ValueError, TypeError):
        return None
    expected = [summary.num_token_bytes, summary.num_documents * RECORD.itemsize]
    return summary if found == expected else None


def _reporter(progress: Any, index: int, done: int) -> Callable[[int], None]:
    def report(num_bytes: int) -> None:
        progress[index] = done + num_bytes

    return report


class _UnitWriter:
    """Takes events in order; keeps at most one batch of text in memory.

    Args:
        folder: where to write.
        tokenizer: encodes.
        ends_documents: False for a piece of a document, whose end is added where the pieces are
            put together.
    """

    stops = True

    def __init__(self, folder: Path, tokenizer: Tokenizer, *, ends_documents: bool) -> None:
        self._tokenizer = tokenizer
        self._dtype = np.dtype(tokenizer.dtype())
        self._eod = np.array([tokenizer.eod] if ends_documents else [], self._dtype).tobytes()
        self._tokens = open(folder / TOKENS_FILE, "wb")  # noqa: SIM115 (closed in __exit__)
        self._records = open(folder / RECORDS_FILE, "wb")  # noqa: SIM115
        self._bad_path = folder / BAD_RECORDS_FILE
        self._pending: list[Piece] = []
        self._pending_characters = 0
        self._document_start = 0  # byte in the file where the document in work begins
        self._document = np.zeros((), RECORD)
        self._begun = False
        self._counts = dict.fromkeys(UnitSummary.__dataclass_fields__, 0)

    def __enter__(self) -> _UnitWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._flush()
                for stream in (self._tokens, self._records):
                    stream.flush()
                    os.fsync(stream.fileno())
                self._counts["num_token_bytes"] = self._tokens.tell()
        finally:
            self._tokens.close()
            self._records.close()

    def summary(self) -> UnitSummary:
        """The counts, once the writer is closed."""
        return UnitSummary(**self._counts)

    def take(self, event: Piece | BadRecord | Skipped | EndOfPart) -> None:
        """Handle the next event of a part."""
        match event:
            case Piece():
                self._pending.append(event)
                self._pending_characters += len(event.text)
                full = self._pending_characters >= _BATCH_CHARACTERS
                if full or len(self._pending) >= _BATCH_TEXTS:
                    self._flush()
            case BadRecord():
                self._abandon()
                self._note_bad(event)
            case Skipped():
                self._counts[f"num_{event.reason}"] += 1
            case EndOfPart():
                self._counts["num_lines"] += event.num_lines

    def _flush(self) -> None:
        texts = [piece.text for piece in self._pending]
        arrays = self._tokenizer.encode_arrays(texts, self._dtype) if texts else []
        for piece, ids in zip(self._pending, arrays, strict=True):
            self._append(piece, ids)
        self._pending = []
        self._pending_characters = 0

    def _append(self, piece: Piece, ids: npt.NDArray[Any]) -> None:
        if not self._begun:
            self._begun = True
            self._document["split_hash"] = split_hash(piece.text)
        self._tokens.write(ids.tobytes())
        self._document["num_tokens"] += len(ids)
        self._document["num_bytes"] += piece.num_bytes
        if piece.ends_document:
            self._tokens.write(self._eod)
            self._records.write(self._document.tobytes())
            self._counts["num_documents"] += 1
            self._begin_document()

    def _begin_document(self) -> None:
        self._begun = False
        self._document_start = self._tokens.tell()
        self._document = np.zeros((), RECORD)

    def _abandon(self) -> None:
        """Forget the document in work, of which some may be on disk and some in the batch."""
        self._flush()
        self._tokens.seek(self._document_start)
        self._tokens.truncate()
        self._begin_document()

    def _note_bad(self, record: BadRecord) -> None:
        with open(self._bad_path, "a", encoding="ascii") as stream:
            stream.write(json.dumps(asdict(record)) + "\n")
        self._counts["num_bad"] += 1
        self._counts["num_bad_stopping"] += self.stops
