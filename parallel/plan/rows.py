"""Plans in which a meeting has one index on all its ranks: for pipelines and groups of experts.

Row k is what the ranks run as their k-th micro-batch. A shared sequence goes to the first row in
which enough ranks have room; whole sequences fill the room that is left, costliest first to the
least busy rank, and open new rows behind. In a pipeline every micro-batch is padded to the longest
one, so a row costs its linear time however few tokens it has: few, full rows come first, an even
spread of attention second.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from parallel.plan.cost import CostModel
from parallel.plan.cuts import cut, even_shares
from parallel.plan.records import MicroBatch, Piece, StepPlan


@dataclass(slots=True)
class _Column:
    """One rank while it is being filled."""

    shared: dict[int, list[Piece]] = field(default_factory=dict)
    """Row to the pieces of shared sequences."""
    whole: dict[int, list[int]] = field(default_factory=dict)
    """Row to whole sequences."""
    room: dict[int, int] = field(default_factory=dict)
    """Row to tokens that still fit."""

    def free_row(self) -> int:
        """The first row without a micro-batch."""
        row = 0
        while row in self.room:
            row += 1
        return row


def plan_rows(
    lengths: Sequence[int],
    shares: dict[int, int],
    *,
    num_ranks: int,
    tokens_per_rank: int,
    cost_model: CostModel,
    num_micro_batches_multiple: int = 1,
    expert_parallel_size: int = 1,
    max_rows: int | None = None,
) -> StepPlan:
    """Place the sequences.

    shares: ranks of each shared sequence, by number. max_rows: how many rows a rank may open for
    whole sequences while another has room.
    """
    columns = [_Column() for _ in range(num_ranks)]
    seconds = cost_model.lengths_seconds(lengths)
    busy = np.zeros(num_ranks)
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    rooms: list[np.ndarray] = []
    for sequence in longest_first:
        if sequence in shares:
            _place_shared(
                sequence,
                lengths[sequence],
                shares[sequence],
                columns,
                rooms,
                busy,
                seconds=float(seconds[sequence]),
                capacity=tokens_per_rank,
                cost_model=cost_model,
            )
    whole = [i for i in longest_first if i not in shares]
    _place_whole(
        whole,
        lengths,
        seconds.tolist(),
        columns,
        busy.tolist(),
        tokens_per_rank,
        cost_model.fixed_seconds,
        max_rows or len(lengths) + 1,
    )
    counts = [max(column.room, default=-1) + 1 for column in columns]
    counts = _counts(counts, num_micro_batches_multiple, expert_parallel_size)
    return StepPlan(
        lengths=tuple(lengths),
        tokens_per_rank=tokens_per_rank,
        micro_batches=tuple(
            tuple(_micro_batch(column, row, lengths) for row in range(count))
            for column, count in zip(columns, counts, strict=True)
        ),
        ulysses=tuple(
            i for i in sorted(shares) if cost_model.prefers_ulysses(lengths[i], shares[i])
        ),
    )


def _place_shared(
    sequence: int,
    length: int,
    num_ranks: int,
    columns: list[_Column],
    rooms: list[np.ndarray],
    busy: np.ndarray,
    *,
    seconds: float,
    capacity: int,
    cost_model: CostModel,
) -> None:
    pieces = cut(sequence, even_shares(length, num_ranks))
    needed = max(sum(piece.num_tokens for piece in part) for part in pieces)
    for row, room in enumerate(rooms):
        fitting = np.flatnonzero(room >= needed)
        if len(fitting) >= num_ranks:
            break
    else:
        row = len(rooms)
        rooms.append(np.full(len(columns), capacity))
        fitting = np.arange(len(columns))
    # Stable: of equally busy ranks the first.
    chosen = np.sort(fitting[np.argsort(busy[fitting], kind="stable")[:num_ranks]])
    for rank, part in zip(chosen.tolist(), pieces, strict=True):
        columns[rank].shared.setdefault(row, []).extend(part)
        columns[rank].room.setdefault(row, capacity)
        num_tokens = sum(piece.num_tokens for piece in part)
        columns[rank].room[row] -= num_tokens
        rooms[row][rank] -= num_tokens
    busy[chosen] += cost_model.shared_seconds(length, num_ranks)


def _place_whole(
    whole: list[int],
    lengths: Sequence[int],
    seconds: list[float],
    columns: list[_Column],
    busy: list[float],
    capacity: int,
    fixed_seconds: float,
    max_rows: int,
) -> None:
    heap = [(time, rank) for rank, time in enumerate(busy)]
    heapq.heapify(heap)
    for sequence in whole:
        length = lengths[sequence]
        passed = []
        while heap:
            time, rank = heapq.heappop(heap)
            column = columns[rank]
            fitting = [(room, row) for row, room in column.room.items() if room >= length]
            if fitting or len(column.room) < max_rows:
                break
            passed.append((time, rank))
        else:
            time, rank = passed.pop(0)
            column, fitting = columns[rank], []
        if fitting:
            row = min(fitting)[1]
        else:
            row = column.free_row()
            column.room[row] = capacity
            time += fixed_seconds
        column.room[row] -= length
        column.whole.setdefault(row, []).append(sequence)
        heapq.heappush(heap, (time + seconds[sequence], rank))
        for entry in passed:
            heapq.heappush(heap, entry)


def _counts(counts: list[int], multiple: int, expert_parallel_size: int) -> list[int]:
    fewest = 1 if multiple > 1 else 0
    counts = [-(-max(count, fewest) // multiple) * multiple for count in counts]
    for first in range(0, len(counts), expert_parallel_size):
        group = slice(first, first + expert_parallel_size)
        counts[group] = [max(counts[group])] * len(counts[group])
    return counts


def _micro_batch(column: _Column, row: int, lengths: Sequence[int]) -> MicroBatch:
    whole = (Piece(i, 0, lengths[i]) for i in sorted(column.whole.get(row, ())))
    return MicroBatch((*whole, *column.shared.get(row, ())))
