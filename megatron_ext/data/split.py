"""Which documents are held out: decided by the documents themselves.

A document's number is the 64-bit BLAKE2b hash of its first 64 KiB. It is held out where

    hash < validation_fraction * 2^64.

So a document lands on the same side in every preparation, on any number of workers, wherever it
stands in the input, and two documents that are equal (or begin with the same 64 KiB) land on the
same side: none is trained on and validated on. The beginning is enough to keep copies together,
and it makes the side of a huge document known before it has been read.

A corpus with few documents may leave one side empty by chance. Then the document with the smallest
hash is held out (or, if all would be held out, the one with the largest is trained on), and the
report says so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PREFIX_BYTES = 64 * 1024
_HASH_RANGE = 2**64

Hashes = npt.NDArray[np.uint64]


def split_hash(text: str) -> int:
    """The number of the document that begins with `text` (its first 64 KiB are enough)."""
    # A character has at least one byte, so this many characters hold the prefix.
    return split_hash_of_bytes(text[:PREFIX_BYTES].encode())


def split_hash_of_bytes(data: bytes) -> int:
    """`split_hash` of UTF-8 text."""
    return int.from_bytes(hashlib.blake2b(data[:PREFIX_BYTES], digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class SplitRule:
    """Tells training from validation documents.

    Args:
        threshold: hashes below it are held out.
        held_out: one hash that is held out although it is not below.
        trained_on: one hash that is trained on although it is below.
        note: what was done to a corpus too small for the fraction, else empty.
    """

    threshold: int
    held_out: int | None = None
    trained_on: int | None = None
    note: str = ""

    def is_validation(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """For each hash whether its document is held out."""
        mask = hashes < np.uint64(self.threshold)
        if self.held_out is not None:
            mask |= hashes == np.uint64(self.held_out)
        if self.trained_on is not None:
            mask &= hashes != np.uint64(self.trained_on)
        return mask


def choose_rule(blocks: Iterable[Hashes], validation_fraction: float) -> SplitRule:
    """The rule for a corpus, given all its hashes in blocks (read once, not kept)."""
    threshold = int(validation_fraction * _HASH_RANGE)
    num_documents = num_validation = 0
    smallest, largest = _HASH_RANGE, -1
    for hashes in blocks:
        if len(hashes):
            num_documents += len(hashes)
            num_validation += int((hashes < np.uint64(threshold)).sum())
            smallest = min(smallest, int(hashes.min()))
            largest = max(largest, int(hashes.max()))
    if threshold == 0 or 0 < num_validation < num_documents:
        return SplitRule(threshold)
    if smallest >= largest:
        note = (
            "the corpus has a single document (or copies of one), so nothing is held out and there "
            "is no validation; cut it into several files to have some"
        )
        return SplitRule(threshold, trained_on=largest if num_documents else None, note=note)
    if num_validation == 0:
        note = (
            f"none of the {num_documents} documents fell below the validation fraction "
            f"{validation_fraction}; the one with the smallest hash is held out"
        )
        return SplitRule(threshold, held_out=smallest, note=note)
    note = (
        f"all {num_documents} documents fell below the validation fraction {validation_fraction}; "
        "the one with the largest hash is trained on"
    )
    return SplitRule(threshold, trained_on=largest, note=note)
