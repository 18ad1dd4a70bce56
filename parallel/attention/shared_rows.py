"""One micro-batch of one rank as attention sees it, made once and used by all layers.

The row of tokens holds whole documents first, then ring by ring this rank's pieces (its *shared*
tokens), then padding. All index arithmetic is done here: what is left for a layer is to multiply
and to wait.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from parallel.attention.record_tensors import moved
from parallel.attention.ring_steps import Rectangle, RingStep, own_rows, ring_steps
from parallel.attention.ulysses_rows import sequence_order
from parallel.plan.rings import Ring, RowLayout

Rows = slice | Tensor
"""Rows that lie side by side, or an index of any rows."""


@dataclass(frozen=True, slots=True)
class Documents:
    """Causal sequences, one behind the other from row `first_row` on."""

    first_row: int
    cu_seqlens: tuple[int, ...]
    device_cu_seqlens: Tensor
    """The same, int32 on the device."""
    is_complete: bool
    """Whether these rows are all that the sequences have, on any rank."""

    @property
    def num_tokens(self) -> int:
        return self.cu_seqlens[-1]

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + self.num_tokens)

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest."""
        return max((end - start for start, end in pairwise(self.cu_seqlens)), default=0)

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Rows of each sequence that has any."""
        borders = (self.first_row + border for border in self.cu_seqlens)
        return tuple((start, end) for start, end in pairwise(borders) if end > start)


@dataclass(frozen=True, slots=True)
class Rectangles:
    """The rectangles of one step, also as arguments of one call of a varlen kernel."""

    blocks: tuple[Rectangle, ...]
    query_rows: Rows
    """The shared rows that the kernel gets."""
    key_rows: Rows
    """The rows of the step's buffer that the kernel gets."""
    query_cu_seqlens: Tensor
    key_cu_seqlens: Tensor
    max_queries: int
    max_keys: int


@dataclass(frozen=True, slots=True)
class UlyssesRows:
    """A ring whose ranks exchange heads: each has all tokens of some heads for a while."""

    ranks: tuple[int, ...]
    position: int
    """Of this rank among these."""
    own: slice
    """This rank's shared rows of the ring."""
    member_rows: tuple[slice, ...]
    """For each rank its rows among those of all, as they arrive."""
    documents: Documents
    """The whole sequences."""
    source: Tensor
    """[num_tokens]: for each token, in sequence order, its row as it arrives."""
    target: Tensor
    """The inverse: for each row as it arrives, its place in sequence order."""


@dataclass(frozen=True, slots=True)
class SharedRows:
    """See the module. Rows count from 0 in the micro-batch, shared rows from `num_whole`."""

    whole: Documents
    own: tuple[Documents, ...]
    """This rank's part of sequences that go round, in shared rows; each a run without a gap."""
    own_rows: tuple[tuple[slice, slice], ...]
    """For each ring its shared rows, and its rows in the buffer of the first exchange."""
    steps: tuple[RingStep, ...]
    rectangles: tuple[Rectangles, ...]
    """For each of the steps."""
    ulysses: tuple[UlyssesRows, ...]
    num_rows: int
    """Whole and shared rows; what lies behind is padding."""

    @property
    def num_whole(self) -> int:
        return self.whole.num_tokens

    @property
    def shared(self) -> slice:
        """The shared rows within the micro-batch."""
        return slice(self.num_whole, self.num_rows)

    @property
    def is_shared(self) -> bool:
        """Whether any sequence is; if not, attention is local."""
        return bool(self.own_rows or self.ulysses)


def shared_rows(layout: RowLayout, *, device: torch.device) -> SharedRows:
    """The record of one micro-batch."""
    lengths = [piece.num_tokens for piece in layout.whole]
    sizes = [ring.num_tokens(ring.position(layout.rank)) for ring in layout.rings]
    placed = list(zip(layout.rings, accumulate(sizes, initial=0), strict=False))
    travelling = [(ring, first) for ring, first in placed if not ring.is_ulysses]
    exchanging = [(ring, first) for ring, first in placed if ring.is_ulysses]
    rings, first_rows = [ring for ring, _ in travelling], [first for _, first in travelling]
    steps = ring_steps(rings, rank=layout.rank, first_rows=first_rows)

    on_host = SharedRows(
        whole=_documents(0, lengths, is_complete=True),
        own=tuple(
            _documents(first, run, is_complete=False)
            for first, run in _runs(travelling, layout.rank)
        ),
        own_rows=own_rows(rings, rank=layout.rank, first_rows=first_rows),
        steps=steps,
        rectangles=tuple(_rectangles(step) for step in steps),
        ulysses=tuple(_ulysses(ring, layout.rank, first) for ring, first in exchanging),
        num_rows=sum(lengths) + sum(sizes),
    )
    return on_host if device.type == "cpu" else moved(on_host, device)


def _runs(travelling: Sequence[tuple[Ring, int]], rank: int) -> list[tuple[int, list[int]]]:
    """(first row, lengths) of this rank's rows of the rings, joined where they touch."""
    runs: list[tuple[int, list[int]]] = []
    for ring, first in travelling:
        lengths = [
            sum(piece.num_tokens for piece in pieces) for pieces in ring.pieces[ring.position(rank)]
        ]
        if runs and runs[-1][0] + sum(runs[-1][1]) == first:
            runs[-1][1].extend(lengths)
        else:
            runs.append((first, lengths))
    return runs


def _documents(first_row: int, lengths: Sequence[int], *, is_complete: bool) -> Documents:
    borders = _borders([length for length in lengths if length])
    return Documents(first_row, borders, _int32(borders), is_complete)


def _rectangles(step: RingStep) -> Rectangles:
    blocks = step.rectangles
    query_lengths = [block.num_queries for block in blocks]
    key_lengths = [block.num_keys for block in blocks]
    return Rectangles(
        blocks=blocks,
        query_rows=_rows([block.queries for block in blocks]),
        key_rows=_rows([block.keys for block in blocks]),
        query_cu_seqlens=_int32(_borders(query_lengths)),
        key_cu_seqlens=_int32(_borders(key_lengths)),
        max_queries=max(query_lengths, default=0),
        max_keys=max(key_lengths, default=0),
    )


def _ulysses(ring: Ring, rank: int, first_row: int) -> UlyssesRows:
    order = sequence_order(ring)
    position = ring.position(rank)
    return UlyssesRows(
        ranks=ring.ranks,
        position=position,
        own=slice(first_row, first_row + ring.num_tokens(position)),
        member_rows=order.member_rows,
        documents=_documents(0, order.lengths, is_complete=True),
        source=_int32(order.source),
        target=_int32(np.argsort(order.source)),
    )


def _rows(ranges: Sequence[slice]) -> Rows:
    """The rows of all ranges, one after the other."""
    if all(left.stop == right.start for left, right in pairwise(ranges)):
        return slice(ranges[0].start, ranges[-1].stop) if ranges else slice(0, 0)
    return _int32(np.concatenate([np.arange(rows.start, rows.stop) for rows in ranges]))


def _borders(lengths: Sequence[int]) -> tuple[int, ...]:
    return tuple(accumulate(lengths, initial=0))


def _int32(values: Sequence[int] | npt.NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.int32))
