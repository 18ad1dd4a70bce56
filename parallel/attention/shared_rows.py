"""One micro-batch of one rank as attention sees it, made once and used by all layers.

The row of tokens holds whole documents first, then ring by ring this rank's pieces (its *shared*
tokens), then padding. All index arithmetic of a ring pass is done here: what a layer does is
multiply and wait.
"""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise

import torch
from torch import Tensor

from parallel.attention.ring_steps import Rectangle, RingStep, own_rows, ring_steps
from parallel.plan.rings import Ring, RowLayout


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
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + self.cu_seqlens[-1])

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
    """The rectangles of one step, and the same as arguments of one call of a varlen kernel."""

    blocks: tuple[Rectangle, ...]
    query_rows: Tensor | None
    """[num_queries] the shared rows that the kernel gets, None where these are all. On a CPU,
    where there is no such kernel, always None."""
    key_rows: Tensor | None
    """[num_keys] the rows of the step's buffer that the kernel gets, None for all."""
    query_cu_seqlens: Tensor
    key_cu_seqlens: Tensor
    max_queries: int
    max_keys: int


@dataclass(frozen=True, slots=True)
class SharedRows:
    """See the module; rows are counted from 0 in the micro-batch, shared rows from `num_whole`."""

    whole: Documents
    own: tuple[Documents, ...]
    """This rank's rows of the rings' sequences, counted in shared rows; usually one run."""
    own_rows: tuple[tuple[slice, slice], ...]
    """For each ring its shared rows, and its rows in the buffer of the first exchange."""
    steps: tuple[RingStep, ...]
    rectangles: tuple[Rectangles, ...]
    """For each of the steps."""
    num_rows: int
    """Whole and shared rows; what lies behind is padding."""

    @property
    def num_whole(self) -> int:
        return self.whole.cu_seqlens[-1]

    @property
    def shared(self) -> slice:
        """The shared rows within the micro-batch."""
        return slice(self.num_whole, self.num_rows)

    @property
    def is_shared(self) -> bool:
        """Whether any sequence is; if not, attention is local."""
        return bool(self.own_rows)


def shared_rows(
    layout: RowLayout,
    *,
    device: torch.device,
    ulysses_rings: Collection[tuple[int, ...]] = (),
) -> SharedRows:
    """The record of one micro-batch.

    ulysses_rings: the `ranks` of those rings that exchange heads instead of keys and values; all
    their members must say so.
    """
    # Two pieces of one sequence that lie side by side are one document.
    lengths = [
        sum(piece.num_tokens for piece in pieces)
        for _, pieces in groupby(layout.whole, key=lambda piece: piece.sequence)
    ]
    whole = _documents(0, lengths, device, is_complete=True)
    first_rows = [
        0,
        *accumulate(ring.num_tokens(ring.position(layout.rank)) for ring in layout.rings),
    ]
    rings = layout.rings
    ring_first_rows = first_rows[:-1]
    steps = ring_steps(rings, rank=layout.rank, first_rows=ring_first_rows)
    num_shared = first_rows[-1]
    return SharedRows(
        whole=whole,
        own=(_documents(0, _own_lengths(rings, layout.rank), device, is_complete=False),),
        own_rows=own_rows(rings, rank=layout.rank, first_rows=ring_first_rows),
        steps=steps,
        rectangles=tuple(_rectangles(step, num_shared, device) for step in steps),
        num_rows=whole.cu_seqlens[-1] + num_shared,
    )


def _own_lengths(rings: tuple[Ring, ...], rank: int) -> list[int]:
    return [
        sum(piece.num_tokens for piece in pieces)
        for ring in rings
        for pieces in ring.pieces[ring.position(rank)]
    ]


def _documents(
    first_row: int, lengths: list[int], device: torch.device, *, is_complete: bool
) -> Documents:
    borders = (0, *accumulate(lengths))
    return Documents(first_row, borders, _int32(borders, device), is_complete)


def _rectangles(step: RingStep, num_shared: int, device: torch.device) -> Rectangles:
    blocks = step.rectangles
    query_lengths = [block.num_queries for block in blocks]
    key_lengths = [block.num_keys for block in blocks]
    return Rectangles(
        blocks=blocks,
        query_rows=_rows([block.queries for block in blocks], num_shared, device),
        key_rows=_rows([block.keys for block in blocks], step.num_keys, device),
        query_cu_seqlens=_int32((0, *accumulate(query_lengths)), device),
        key_cu_seqlens=_int32((0, *accumulate(key_lengths)), device),
        max_queries=max(query_lengths, default=0),
        max_keys=max(key_lengths, default=0),
    )


def _rows(ranges: list[slice], num_rows: int, device: torch.device) -> Tensor | None:
    """The rows of all ranges; None on a CPU, and where these are just all rows in their order."""
    borders = [(rows.start, rows.stop) for rows in ranges]
    ends = [0, *(end for _, end in borders)]
    is_all = [start for start, _ in borders] == ends[:-1] and ends[-1] == num_rows
    if device.type == "cpu" or not borders or is_all:
        return None
    return torch.cat([torch.arange(start, end) for start, end in borders]).to(device)


def _int32(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32).to(device, non_blocking=True)
