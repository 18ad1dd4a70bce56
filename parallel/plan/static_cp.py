"""Static context parallelism: one number of ranks for all, large enough for the longest sequence.

What frameworks do today: consecutive groups of cp ranks act as one rank of cp C tokens. Sequences
are packed into micro-batches of that size, each is cut head to tail over the whole group, and all
groups run the same number of micro-batches. A short sequence in a batch with one long one is spread
thin and exchanged for nothing; that is what hybrid data parallelism avoids.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

from parallel.errors import PlanError
from parallel.plan.cost import CostModel
from parallel.plan.cuts import cut
from parallel.plan.input_check import check_not_empty, check_numbers
from parallel.plan.records import MicroBatch, Piece, StepPlan


def plan_static_cp(
    lengths: Sequence[int],
    *,
    num_ranks: int,
    tokens_per_rank: int,
    cost_model: CostModel,
    num_micro_batches_multiple: int = 1,
    context_parallel_size: int | None = None,
) -> StepPlan:
    """Plan a step; context_parallel_size: by default `smallest_context_parallel_size`.

    A sequence of less than 2 cp tokens is not cut but given to its group's emptiest rank.

    Raises:
        PlanError: a sequence is empty, or longer than all ranks (or a given group) can hold.
    """
    check_numbers(
        num_ranks=num_ranks,
        tokens_per_rank=tokens_per_rank,
        num_micro_batches_multiple=num_micro_batches_multiple,
    )
    check_not_empty(lengths)
    smallest = smallest_context_parallel_size(
        lengths, num_ranks=num_ranks, tokens_per_rank=tokens_per_rank
    )
    size = context_parallel_size or smallest
    if num_ranks % size or size < smallest:
        raise PlanError(
            f"context_parallel_size is {size}; it must divide the {num_ranks} ranks and be at "
            f"least {smallest} for the longest sequence, {max(lengths)} tokens"
        )
    packs = _best_fit(lengths, size, tokens_per_rank)
    work = [
        sum(cost_model.sequence_seconds(lengths[sequence]) for sequence, _ in pack.parts)
        for pack in packs
    ]
    groups = _deal(work, num_ranks // size, num_micro_batches_multiple)
    micro_batches: list[tuple[MicroBatch, ...]] = []
    for group in groups:
        empty = [MicroBatch()] * size
        rows = [empty if n is None else packs[n].micro_batches(lengths) for n in group]
        micro_batches += [tuple(row[rank] for row in rows) for rank in range(size)]
    return StepPlan(
        lengths=tuple(lengths),
        tokens_per_rank=tokens_per_rank,
        micro_batches=tuple(micro_batches),
    )


def smallest_context_parallel_size(
    lengths: Sequence[int], *, num_ranks: int, tokens_per_rank: int
) -> int:
    """The smallest divisor of the ranks whose group holds the longest sequence."""
    longest = max(lengths, default=1)
    for size in range(1, num_ranks + 1):
        if num_ranks % size == 0 and size * tokens_per_rank >= longest:
            return size
    raise PlanError(
        f"sequence {lengths.index(longest)} has {longest} tokens, but {num_ranks} ranks of "
        f"tokens_per_rank = {tokens_per_rank} hold {num_ranks * tokens_per_rank}; raise "
        f"tokens_per_rank to {-(-longest // num_ranks)} or cut sequences"
    )


def _deal(work: Sequence[float], num_groups: int, multiple: int) -> list[list[int | None]]:
    """Micro-batches to groups, costliest first to the least busy; all get equally many."""
    rounds = max(-(-len(work) // num_groups), 1 if multiple > 1 else 0)
    rounds = -(-rounds // multiple) * multiple
    groups: list[list[int | None]] = [[] for _ in range(num_groups)]
    busy = [(0.0, group) for group in range(num_groups)]
    heapq.heapify(busy)
    for number in sorted(range(len(work)), key=lambda n: (-work[n], n)):
        time, group = heapq.heappop(busy)
        groups[group].append(number)
        if len(groups[group]) < rounds:
            heapq.heappush(busy, (time + work[number], group))
    return [[*group, *[None] * (rounds - len(group))] for group in groups]


@dataclass(slots=True)
class _Pack:
    """One micro-batch of a group while it is filled."""

    capacity: int
    """Tokens of each rank."""
    whole_load: list[int]
    """Tokens of each rank in sequences that are not cut."""
    num_cut_tokens: int = 0
    parts: list[tuple[int, int]] = field(default_factory=list)
    """(sequence, rank), rank -1: cut over all."""

    def add(self, sequence: int, length: int) -> bool:
        """Take a sequence, if every rank can hold its part."""
        size = len(self.whole_load)
        # Odd tokens of cut sequences go round, so no rank has more than the mean rounded up.
        cut_load = -(-self.num_cut_tokens // size)
        fullest = max(self.whole_load)
        emptiest = min(range(size), key=self.whole_load.__getitem__)
        on_one = self.whole_load[emptiest] + length
        if length < 2 * size and max(fullest, on_one) + cut_load <= self.capacity:
            self.whole_load[emptiest] = on_one
            self.parts.append((sequence, emptiest))
            return True
        if fullest + -(-(self.num_cut_tokens + length) // size) <= self.capacity:
            self.num_cut_tokens += length
            self.parts.append((sequence, -1))
            return True
        return False

    def micro_batches(self, lengths: Sequence[int]) -> list[MicroBatch]:
        """Of each rank of the group."""
        size = len(self.whole_load)
        pieces: list[list[Piece]] = [[] for _ in range(size)]
        turn = 0
        for sequence, rank in self.parts:
            length = lengths[sequence]
            if rank >= 0:
                pieces[rank].append(Piece(sequence, 0, length))
                continue
            share, over = divmod(length, size)
            shares = [share + ((other - turn) % size < over) for other in range(size)]
            turn = (turn + over) % size
            holders = [other for other in range(size) if shares[other]]
            cuts = cut(sequence, [shares[other] for other in holders])
            for other, part in zip(holders, cuts, strict=True):
                pieces[other] += part
        return [MicroBatch(tuple(part)) for part in pieces]


def _best_fit(lengths: Sequence[int], ranks_per_group: int, tokens_per_rank: int) -> list[_Pack]:
    """Longest first, each into the fullest micro-batch with room."""
    rooms: list[tuple[int, int]] = []
    packs: list[_Pack] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(rooms, (lengths[index], -1))
        while place < len(rooms) and not packs[rooms[place][1]].add(index, lengths[index]):
            place += 1
        if place < len(rooms):
            room, number = rooms.pop(place)
        else:
            room, number = ranks_per_group * tokens_per_rank, len(packs)
            packs.append(_Pack(tokens_per_rank, [0] * ranks_per_group))
            has_room = packs[number].add(index, lengths[index])
            assert has_room, (lengths[index], ranks_per_group, tokens_per_rank)
        insort(rooms, (room - lengths[index], number))
    return packs
