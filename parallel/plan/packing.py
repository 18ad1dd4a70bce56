"""The simplest planner: whole sequences, packed into micro-batches, spread over ranks.

Three steps, each greedy and deterministic:

1. How many micro-batches? Best-fit decreasing (longest sequence first, into the fullest
   micro-batch that still has room) finds a number that holds everything. Rounded up to a multiple
   of the ranks it gives each rank the same number: where there must be one more round of
   micro-batches, a rank that sat it out would only wait.
2. Which rank? Costliest sequence first, each to the rank with the least work that still has room
   for it in that number of micro-batches (longest processing time first).
3. Which micro-batch? Within a rank again costliest first, each to the lightest one with room, so
   that a pipeline sees even micro-batches; where that fails to fit, best-fit as in step 1.

A rank in step 2 may run out of room: a sequence that fits no rank opens another micro-batch. Step 2
is therefore tried with one more micro-batch per rank as well, and without a limit; the cost model
decides. Attention makes long sequences cost more per token, so ranks get equal work, not equal
tokens.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence

from parallel.errors import PlanError
from parallel.plan.cost import CostModel
from parallel.plan.input_check import check_not_empty, check_numbers
from parallel.plan.records import MicroBatch, Piece, StepPlan

# Sequence numbers of one micro-batch, and the micro-batches of one rank.
_Bin = list[int]
_Rank = list[_Bin]


def plan_packing(
    lengths: Sequence[int],
    *,
    num_ranks: int,
    tokens_per_rank: int,
    cost_model: CostModel,
    num_micro_batches_multiple: int = 1,
    equal_num_micro_batches: bool = False,
) -> StepPlan:
    """Pack sequences of these lengths (tokens), at most tokens_per_rank to a micro-batch.

    num_micro_batches_multiple: every rank's number of micro-batches is a multiple of this, as
    interleaved pipelines need. equal_num_micro_batches: all ranks have the same number, as groups
    of experts need. Both are met by spreading a rank's sequences thinner, and by empty
    micro-batches where it has too few; without them a rank may have no micro-batch.

    Micro-batches run from the costliest to the cheapest; sequences keep their order within one.
    Raises PlanError for a sequence that is empty or longer than tokens_per_rank.
    """
    _check(lengths, num_ranks, tokens_per_rank, num_micro_batches_multiple)
    packer = _Packer(lengths, num_ranks, tokens_per_rank, cost_model)

    def counts_of(ranks: list[_Rank]) -> list[int]:
        # A pipeline that wants a multiple wants it of every rank, also of one without work.
        fewest = 1 if num_micro_batches_multiple > 1 else 0
        counts = [_round_up(max(len(rank), fewest), num_micro_batches_multiple) for rank in ranks]
        return [max(counts)] * num_ranks if equal_num_micro_batches else counts

    ranks = min(packer.candidates(), key=lambda ranks: packer.step_seconds(ranks, counts_of(ranks)))
    counts = counts_of(ranks)
    return StepPlan(
        lengths=tuple(lengths),
        tokens_per_rank=tokens_per_rank,
        micro_batches=tuple(
            packer.micro_batches(rank, count) for rank, count in zip(ranks, counts, strict=True)
        ),
    )


def _check(
    lengths: Sequence[int], num_ranks: int, tokens_per_rank: int, num_micro_batches_multiple: int
) -> None:
    check_numbers(
        num_ranks=num_ranks,
        tokens_per_rank=tokens_per_rank,
        num_micro_batches_multiple=num_micro_batches_multiple,
    )
    check_not_empty(lengths)
    for index, length in enumerate(lengths):
        if length > tokens_per_rank:
            raise PlanError(
                f"sequence {index} has {length} tokens, but a micro-batch holds tokens_per_rank = "
                f"{tokens_per_rank}; raise tokens_per_rank to {length}, cut sequences at "
                f"{tokens_per_rank} tokens, or use a planner that spreads one over several ranks"
            )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


class _Packer:
    """The lengths and limits of one step, and the greedy choices over them."""

    def __init__(
        self, lengths: Sequence[int], num_ranks: int, tokens_per_rank: int, cost_model: CostModel
    ) -> None:
        self.lengths = lengths
        self.num_ranks = num_ranks
        self.capacity = tokens_per_rank
        self.fixed_seconds = cost_model.fixed_seconds
        self.seconds: list[float] = cost_model.lengths_seconds(lengths).tolist()
        # A longer sequence costs more and is harder to place; equal ones keep their order.
        self.longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))

    def candidates(self) -> list[list[_Rank]]:
        """Steps 1 and 2: the sequences of each rank, in micro-batches that hold them."""
        needed = self._num_best_fit_bins()
        per_rank = -(-needed // self.num_ranks)
        limits = (per_rank, per_rank + 1, max(1, len(self.lengths)))
        return [self._least_work_first(limit) for limit in limits]

    def step_seconds(self, ranks: list[_Rank], counts: Sequence[int]) -> float:
        """The slowest rank's work with its final number of micro-batches."""
        return max(
            sum(self.seconds[i] for sequences in rank for i in sequences)
            + self.fixed_seconds * count
            for rank, count in zip(ranks, counts, strict=True)
        )

    def micro_batches(self, rank: _Rank, count: int) -> tuple[MicroBatch, ...]:
        """Step 3: a rank's sequences in `count` micro-batches, costliest first."""
        bins = self._spread(rank, count) or rank
        bins = sorted(bins, key=lambda b: (-sum(self.seconds[i] for i in b), b))
        batches = [
            MicroBatch(tuple(Piece(i, 0, self.lengths[i]) for i in sorted(sequences)))
            for sequences in bins
        ]
        return (*batches, *(MicroBatch() for _ in range(count - len(batches))))

    def _num_best_fit_bins(self) -> int:
        """How many micro-batches best-fit decreasing needs."""
        # In ascending order: the first room that is large enough is the tightest fit.
        rooms: list[int] = []
        num_bins = 0
        for i in self.longest_first:
            length = self.lengths[i]
            place = bisect_left(rooms, length)
            if place < len(rooms):
                room = rooms.pop(place)
            else:
                room = self.capacity
                num_bins += 1
            insort(rooms, room - length)
        return num_bins

    def _least_work_first(self, limit: int) -> list[_Rank]:
        """Each sequence to the least busy rank with room in at most `limit` micro-batches."""
        ranks: list[_Rank] = [[] for _ in range(self.num_ranks)]
        rooms: list[list[int]] = [[] for _ in range(self.num_ranks)]
        heap = [(0.0, rank) for rank in range(self.num_ranks)]
        for i in self.longest_first:
            length = self.lengths[i]
            passed: list[tuple[float, int]] = []
            while heap:
                busy, rank = heapq.heappop(heap)
                place = _tightest(rooms[rank], length)
                if place is not None or len(rooms[rank]) < limit:
                    break
                passed.append((busy, rank))
            else:
                # No rank has room: one more micro-batch on the least busy.
                busy, rank = passed.pop(0)
                place = None
            if place is None:
                place = len(rooms[rank])
                rooms[rank].append(self.capacity)
                ranks[rank].append([])
                busy += self.fixed_seconds
            rooms[rank][place] -= length
            ranks[rank][place].append(i)
            heapq.heappush(heap, (busy + self.seconds[i], rank))
            for entry in passed:
                heapq.heappush(heap, entry)
        return ranks

    def _spread(self, rank: _Rank, count: int) -> list[_Bin] | None:
        """Even bins by longest-processing-time first; None where that does not fit."""
        sequences = sorted(
            (i for sequences in rank for i in sequences), key=lambda i: (-self.lengths[i], i)
        )
        bins: list[_Bin] = [[] for _ in range(min(count, len(sequences)))]
        rooms = [self.capacity] * len(bins)
        times = [0.0] * len(bins)
        for i in sequences:
            fitting = [b for b, room in enumerate(rooms) if room >= self.lengths[i]]
            if not fitting:
                return None
            lightest = min(fitting, key=times.__getitem__)
            bins[lightest].append(i)
            rooms[lightest] -= self.lengths[i]
            times[lightest] += self.seconds[i]
        return bins


def _tightest(rooms: Sequence[int], length: int) -> int | None:
    """The index of the least room that is enough, if any."""
    fitting = [(room, index) for index, room in enumerate(rooms) if room >= length]
    return min(fitting)[1] if fitting else None
