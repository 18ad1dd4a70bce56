"""Text in, a prepared corpus out: `data prepare`.

    list the inputs -> cut them into units -> train or load the tokenizer
      -> workers tokenise units, each finished one stays on disk
      -> merge the units into train and validation -> metadata.json

Killed at any moment, the same command goes on with what is finished; the result is the same byte
for byte, whatever the number of workers and however often it was killed.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ext.data.bad_records import gather_bad_records, write_bad_records
from megatron_ext.data.disk import KEPT_UNITS, explain_full_disk, sync_folder, write_json
from megatron_ext.data.inputs import Listing, list_inputs
from megatron_ext.data.merge import UnitStore, merge_units
from megatron_ext.data.sample import train_tokenizer
from megatron_ext.data.settings import PrepareSettings
from megatron_ext.data.tokenise import tokenise_units
from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer, open_tokenizer
from megatron_ext.data.units import Unit, cut_into_units
from megatron_ext.data.workplace import (
    BAD_RECORDS_FILE,
    METADATA_FILE,
    SPLIT_SUFFIXES,
    SPLITS,
    Manifest,
    Workplace,
    find_finished,
    make_manifest,
)

__all__ = ["PrepareReport", "PrepareSettings", "SplitCounts", "prepare"]


@dataclass(frozen=True, slots=True)
class SplitCounts:
    """What a split holds; `num_tokens` counts each document's end, as training predicts it."""

    num_documents: int
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What a preparation made and what it passed over.

    Args:
        output: the corpus.
        train: what is trained on.
        validation: what is held out.
        vocab_size: ids of its tokenizer.
        counts: bad records, empty texts, binary files and entries passed over, by name.
        notes: what a reader should know, in sentences.
        already_prepared: the corpus was there, and nothing was done.
        num_input_bytes: size of all inputs on disk.
        num_resumed_bytes: of these, done by an earlier, interrupted run.
        seconds: wall time of this run.
        peak_worker_bytes: largest resident memory of one worker.
    """

    output: Path
    train: SplitCounts
    validation: SplitCounts
    vocab_size: int
    counts: dict[str, int]
    notes: tuple[str, ...]
    already_prepared: bool
    num_input_bytes: int
    num_resumed_bytes: int
    seconds: float
    peak_worker_bytes: int

    @property
    def bytes_per_second(self) -> float:
        """Input handled in this run, per second of it."""
        return (self.num_input_bytes - self.num_resumed_bytes) / max(self.seconds, 1e-9)


def prepare(settings: PrepareSettings, *, show_progress: bool = True) -> PrepareReport:
    """Make a corpus, or go on with one that was interrupted, or find that it is there.

    Raises:
        UserError: an input, a record, the output folder, the tokenizer or the disk is not as it
            has to be; the text says which, and what to do.
    """
    started = time.monotonic()
    given = None
    if settings.trained_vocab_size is None:
        given = open_tokenizer(settings.tokenizer, eod_token=settings.eod_token)
    listing = list_inputs(settings)
    unit_bytes = settings.unit_size(listing.num_bytes)
    units = cut_into_units(listing, unit_bytes=unit_bytes, text_key=settings.text_key)
    name = given.fingerprint if given else settings.training_name()
    manifest = make_manifest(settings, listing, tokenizer=name, unit_bytes=unit_bytes)
    num_resumed_bytes = peak_worker_bytes = 0
    with Workplace(settings.output) as place, explain_full_disk(settings.output, KEPT_UNITS):
        metadata = None if settings.overwrite else find_finished(settings.output, manifest)
        already = metadata is not None
        if metadata is None:
            place.begin(manifest, overwrite=settings.overwrite)
            tokenizer, peak = _ensure_tokenizer(settings, place, units, given, show=show_progress)
            done = tokenise_units(settings, place, units, show=show_progress)
            num_resumed_bytes = done.num_resumed_bytes
            peak_worker_bytes = max(peak, done.peak_worker_bytes)
            dtype, eod = tokenizer.dtype(), tokenizer.eod
            store = UnitStore(units, done.summaries, place.units_folder, dtype, eod)
            metadata = _publish(settings, place, store, tokenizer, manifest, listing)
        place.remove_work()
    return PrepareReport(
        output=settings.output,
        train=_split_counts(metadata, "train"),
        validation=_split_counts(metadata, "validation"),
        vocab_size=metadata["tokenizer"]["vocab_size"],
        counts=metadata["counts"],
        notes=tuple(metadata["notes"]),
        already_prepared=already,
        num_input_bytes=listing.num_bytes,
        num_resumed_bytes=num_resumed_bytes,
        seconds=time.monotonic() - started,
        peak_worker_bytes=peak_worker_bytes,
    )


def _ensure_tokenizer(
    settings: PrepareSettings,
    place: Workplace,
    units: list[Unit],
    given: Tokenizer | None,
    *,
    show: bool,
) -> tuple[Tokenizer, int]:
    """The tokenizer in the output folder, put there if this run is the first.

    Returns:
        The tokenizer, and the peak memory of the process that trained it, in bytes.
    """
    folder = place.tokenizer_folder
    peak_bytes = 0
    if not folder.exists():
        temporary = place.folder / "tokenizer.tmp"
        if given is None:
            peak_bytes = train_tokenizer(settings, units, temporary, show=show)
        else:
            given.save(temporary)
        os.replace(temporary, folder)
    return load_tokenizer(folder), peak_bytes


def _publish(
    settings: PrepareSettings,
    place: Workplace,
    store: UnitStore,
    tokenizer: Tokenizer,
    manifest: Manifest,
    listing: Listing,
) -> dict[str, Any]:
    """Merge the units, put the files in place, write metadata.json; its content."""
    folder = place.merge_folder
    folder.mkdir()
    merged, rule = merge_units(store, folder, validation_fraction=settings.validation_fraction)
    records = gather_bad_records(store.units, store.summaries, store.folder)
    bad = write_bad_records(folder / BAD_RECORDS_FILE, store.units, records)
    names = [split + suffix for split in SPLITS for suffix in SPLIT_SUFFIXES]
    for name in names + ([BAD_RECORDS_FILE] if bad.num_bad else []):
        os.replace(folder / name, place.output / name)
    if not bad.num_bad:
        (place.output / BAD_RECORDS_FILE).unlink(missing_ok=True)
    sync_folder(place.output)
    digest = hashlib.blake2b(digest_size=16)
    for part in (tokenizer.fingerprint, *(merged[split].fingerprint for split in SPLITS)):
        digest.update(part.encode())
    metadata = {
        **manifest,
        "fingerprint": digest.hexdigest(),
        "tokenizer": tokenizer.describe(),
        "splits": {split: asdict(merged[split]) for split in SPLITS},
        "counts": _counts(store, bad.num_bad, listing.passed_over),
        "notes": _notes(settings, tokenizer, rule.note),
    }
    write_json(place.output / METADATA_FILE, metadata)
    return metadata


def _counts(store: UnitStore, num_bad: int, passed_over: Mapping[str, int]) -> dict[str, int]:
    def count(name: str) -> int:
        # A file in pieces is one file: each piece saw the same, so the first one speaks.
        firsts = (store.summaries[group[0].index] for group in store.groups())
        return sum(int(getattr(summary, name)) for summary in firsts)

    return {
        "bad_records": num_bad,
        "empty_documents": count("num_empty"),
        "binary_files": count("num_binary"),
        **passed_over,
    }


def _notes(settings: PrepareSettings, tokenizer: Tokenizer, split_note: str) -> list[str]:
    notes = [split_note] if split_note else []
    wanted = settings.trained_vocab_size
    if wanted is not None and tokenizer.vocab_size < wanted:
        notes.append(
            f"the text gave a vocabulary of {tokenizer.vocab_size} ids, fewer than the {wanted} "
            "asked for"
        )
    return notes


def _split_counts(metadata: dict[str, Any], split: str) -> SplitCounts:
    found = metadata["splits"][split]
    return SplitCounts(found["num_documents"], found["num_tokens"], found["num_bytes"])
