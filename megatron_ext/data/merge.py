"""Finished units, in input order, become the token files of the two splits.

Two passes, neither of which holds more than a block in memory: the first reads the documents'
hashes and settles the split rule, the second copies each run of documents of one split to its
file. Pieces of a document that was cut over several units are put together here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_ext.data.disk import COPY_BYTES
from megatron_ext.data.indexed import MAX_DOCUMENT_TOKENS, IndexedWriter
from megatron_ext.data.inputs import shown
from megatron_ext.data.split import SplitRule, choose_rule
from megatron_ext.data.unit_writer import (
    RECORD,
    RECORDS_FILE,
    TOKENS_FILE,
    UnitSummary,
    unit_folder,
)
from megatron_ext.data.units import Unit, group_fragments
from megatron_ext.data.workplace import SPLITS
from megatron_ext.errors import UserError

_RECORDS_AT_ONCE = 1 << 18

Records = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class MergedSplit:
    """What one split holds: documents, stored ids (ends included), UTF-8 bytes, fingerprint."""

    num_documents: int
    num_tokens: int
    num_bytes: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class UnitStore:
    """The finished units.

    Args:
        units: all of them, in input order.
        summaries: by unit index.
        folder: where they lie.
        dtype: of the stored ids.
        eod: the end-of-document id.
    """

    units: Sequence[Unit]
    summaries: Mapping[int, UnitSummary]
    folder: Path
    dtype: npt.DTypeLike
    eod: int

    def groups(self) -> Iterator[list[Unit]]:
        """Units by themselves, or all that hold pieces of one document."""
        return group_fragments(self.units)

    def paths(self, group: list[Unit], name: str) -> list[Path]:
        """The files of that name in the units of a group."""
        return [unit_folder(self.folder, unit.index) / name for unit in group]

    def records(self, group: list[Unit]) -> Iterator[Records]:
        """The documents of a group in blocks; none, if it is one document with a bad piece.

        Raises:
            UserError: a document is longer than the .idx format can hold.
        """
        for block in self._blocks(group):
            longest = int(block["num_tokens"].max(initial=0))
            if longest + 1 > MAX_DOCUMENT_TOKENS:
                names = sorted({shown(part.file.path) for unit in group for part in unit.parts})
                raise UserError(
                    f"a document of {longest} tokens in {names[0]}"
                    + (f" or one of {len(names) - 1} files after it" if len(names) > 1 else "")
                    + f": the .idx format holds at most {MAX_DOCUMENT_TOKENS - 1}. Cut the file "
                    "into several and start again with --overwrite"
                )
            yield block

    def _blocks(self, group: list[Unit]) -> Iterator[Records]:
        paths = self.paths(group, RECORDS_FILE)
        if group[0].fragment_of is not None:
            yield self._one_document(group, paths)
            return
        with open(paths[0], "rb") as stream:
            while data := stream.read(_RECORDS_AT_ONCE * RECORD.itemsize):
                yield np.frombuffer(data, RECORD)

    def _one_document(self, group: list[Unit], paths: list[Path]) -> Records:
        summaries = [self.summaries[unit.index] for unit in group]
        if any(summary.num_bad or summary.num_binary for summary in summaries):
            return np.empty(0, RECORD)
        pieces = np.concatenate([np.fromfile(path, RECORD) for path in paths])
        document = pieces[:1].copy()
        document["num_tokens"] = pieces["num_tokens"].sum()
        document["num_bytes"] = pieces["num_bytes"].sum()
        return document


def merge_units(
    store: UnitStore, folder: Path, *, validation_fraction: float
) -> tuple[dict[str, MergedSplit], SplitRule]:
    """Write both splits into a folder; what they hold, by name, and how they were told apart.

    Raises:
        UserError: there is no document at all, or one is too long.
    """
    hashes = (block["split_hash"] for group in store.groups() for block in store.records(group))
    first = next((block for block in hashes if len(block)), None)
    if first is None:
        raise UserError(_nothing_left(store))
    rule = choose_rule(itertools.chain([first], hashes), validation_fraction)
    with ExitStack() as stack:
        writers = [IndexedWriter(folder / name, store.dtype) for name in SPLITS]
        for writer in writers:
            stack.callback(writer.close)
        for group in store.groups():
            _copy_group(store, group, rule, writers)
        merged = {}
        for name, writer in zip(SPLITS, writers, strict=True):
            digest = writer.finish()
            counts = (writer.num_documents, writer.num_tokens, writer.num_bytes)
            merged[name] = MergedSplit(*counts, fingerprint=digest)
    return merged, rule


def _nothing_left(store: UnitStore) -> str:
    summaries = store.summaries.values()
    empty, binary, bad = (
        sum(getattr(summary, name) for summary in summaries)
        for name in ("num_empty", "num_binary", "num_bad")
    )
    return (
        f"no document is left: {empty} without text, {binary} binary files, {bad} bad records. "
        "Check --input, --include and --text-key"
    )


def _copy_group(
    store: UnitStore, group: list[Unit], rule: SplitRule, writers: list[IndexedWriter]
) -> None:
    with ExitStack() as stack:
        paths = store.paths(group, TOKENS_FILE)
        streams = [stack.enter_context(open(path, "rb")) for path in paths]
        for block in store.records(group):
            held_out = rule.is_validation(block["split_hash"])
            borders = np.flatnonzero(held_out[1:] != held_out[:-1]) + 1
            for start, end in itertools.pairwise([0, *borders.tolist(), len(block)]):
                if start < end:
                    writer = writers[int(held_out[start])]
                    _copy_run(store, group, streams, block[start:end], writer)


def _copy_run(
    store: UnitStore,
    group: list[Unit],
    streams: Sequence[BinaryIO],
    run: Records,
    writer: IndexedWriter,
) -> None:
    """Copy consecutive documents of one split, the next that their streams hold."""
    itemsize = np.dtype(store.dtype).itemsize
    if group[0].fragment_of is None:
        _copy_ids(streams[0], writer, (int(run["num_tokens"].sum()) + len(run)) * itemsize)
    else:
        for unit, stream in zip(group, streams, strict=True):
            _copy_ids(stream, writer, store.summaries[unit.index].num_token_bytes)
        writer.write_ids(np.array([store.eod], store.dtype).tobytes())
    writer.add_documents(run["num_tokens"], run["num_bytes"])


def _copy_ids(stream: BinaryIO, writer: IndexedWriter, num_bytes: int) -> None:
    while num_bytes > 0:
        data = stream.read(min(num_bytes, COPY_BYTES))
        assert data, "a finished unit has fewer ids than its records say"
        writer.write_ids(data)
        num_bytes -= len(data)
