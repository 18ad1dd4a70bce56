"""Training a tokenizer on a bounded sample of the training documents.

Units are taken in a shuffled but fixed order, and from each the first documents up to a quota, so
the sample is spread over the whole input, is the same every time, and costs the same for a
gigabyte as for a terabyte. Documents that are held out are left out; where the sample holds none
of them, the one with the smallest hash is left out, since that is the one a small corpus holds out
(split.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_ext.data.disk import KEPT_UNITS, explain_full_disk
from megatron_ext.data.progress import say
from megatron_ext.data.records import Event, Piece, read_part
from megatron_ext.data.settings import PrepareSettings
from megatron_ext.data.split import PREFIX_BYTES, choose_rule, split_hash, split_hash_of_bytes
from megatron_ext.data.streams import open_source
from megatron_ext.data.tokenizer import train_bpe
from megatron_ext.data.units import Part, Unit
from megatron_ext.data.workers import WorkerPool
from megatron_ext.errors import UserError

_MIN_QUOTA_BYTES = 256 * 1024
_SPARE_UNITS = 4
_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """What the training process needs.

    Args:
        units: where to take text from, in this order.
        quota_bytes: text to take from each, at most.
        sample_bytes: text to take in all.
        vocab_size: ids to make.
        validation_fraction: share of documents that are held out.
        text_key: key or column of the text.
        max_record_bytes: longer lines are passed over.
        folder: where to save the tokenizer.
    """

    units: tuple[Unit, ...]
    quota_bytes: int
    sample_bytes: int
    vocab_size: int
    validation_fraction: float
    text_key: str
    max_record_bytes: int
    folder: Path


def train_tokenizer(
    settings: PrepareSettings, units: Sequence[Unit], folder: Path, *, show: bool
) -> int:
    """Train the tokenizer that the settings ask for and save it into a folder.

    Returns:
        The largest resident memory of the training process, in bytes.

    Raises:
        UserError: there is no text to train on.
    """
    vocab_size = settings.trained_vocab_size
    assert vocab_size is not None
    sample_bytes = settings.sample_bytes(vocab_size)
    sampled, quota_bytes = _choose_units(units, sample_bytes)
    job = TrainingJob(
        units=sampled,
        quota_bytes=quota_bytes,
        sample_bytes=sample_bytes,
        vocab_size=vocab_size,
        validation_fraction=settings.validation_fraction,
        text_key=settings.text_key,
        max_record_bytes=settings.max_record_bytes,
        folder=folder,
    )
    say(f"training a tokenizer of {vocab_size} ids", show=show)
    threads = {
        "TOKENIZERS_PARALLELISM": "true",
        "RAYON_NUM_THREADS": str(settings.worker_count()),
    }
    # In a process of its own: the text and the library's memory go away with it, and Ctrl-C works.
    with WorkerPool(num_workers=1, build=_build, setup=None, environment=threads) as pool:
        pool.submit(job)
        while pool.num_busy:
            pool.wait(_POLL_SECONDS)
    return pool.peak_bytes


def _choose_units(units: Sequence[Unit], sample_bytes: int) -> tuple[tuple[Unit, ...], int]:
    """Units to sample from, in a fixed shuffled order, and the quota of each in bytes."""
    quota = max(sample_bytes // len(units), _MIN_QUOTA_BYTES)
    # More than the sample needs, because some may hold less text than their quota.
    count = max(_SPARE_UNITS * sample_bytes // quota, _SPARE_UNITS)
    return tuple(sorted(units, key=_shuffled)[:count]), quota


def _build(_: None) -> Callable[[TrainingJob], int]:
    def job(training: TrainingJob) -> int:
        with explain_full_disk(training.folder.parent, KEPT_UNITS):
            return _train(training)

    return job


def _shuffled(unit: Unit) -> bytes:
    return hashlib.blake2b(unit.index.to_bytes(8, "little"), digest_size=8).digest()


def _train(job: TrainingJob) -> int:
    """Train and save; the sample's characters."""
    texts: list[str] = []
    hashes: list[int] = []
    taken = 0
    for unit in job.units:
        if taken >= job.sample_bytes:
            break
        taken += _sample_unit(unit, job, texts, hashes)
    if not texts:
        raise UserError(
            "there is no text to train a tokenizer on: every document is empty, binary or bad. "
            "See the inputs, or give --tokenizer FILE or bytes"
        )
    numbers = np.array(hashes, np.uint64)
    held_out = choose_rule([numbers], job.validation_fraction).is_validation(numbers)
    sample = [text for text, left_out in zip(texts, held_out, strict=True) if not left_out]
    train_bpe(sample, job.vocab_size).save(job.folder)
    return sum(map(len, sample))


def _sample_unit(unit: Unit, job: TrainingJob, texts: list[str], hashes: list[int]) -> int:
    """Append the unit's first pieces up to the quota; the bytes taken."""
    taken = 0
    for part in unit.parts:
        of_file = _hash_of_file(part) if unit.fragment_of is not None else None
        of_document: int | None = None
        for event in _read(part, job):
            if isinstance(event, Piece):
                if of_document is None:
                    of_document = split_hash(event.text) if of_file is None else of_file
                texts.append(event.text)
                hashes.append(of_document)
                taken += event.num_bytes
                if taken >= job.quota_bytes:
                    return taken
            if not isinstance(event, Piece) or event.ends_document:
                of_document = None
    return taken


def _hash_of_file(part: Part) -> int:
    """The split hash of the document that a part is a piece of: it is decided by its beginning."""
    with open_source(part.file) as stream:
        return split_hash_of_bytes(stream.read(PREFIX_BYTES))


def _read(part: Part, job: TrainingJob) -> Iterator[Event]:
    return read_part(
        part,
        text_key=job.text_key,
        max_record_bytes=job.max_record_bytes,
        advance=lambda _: None,
    )
