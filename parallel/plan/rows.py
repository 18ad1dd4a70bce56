"""Plans in which a meeting has one index on all its ranks: for pipelines and groups of experts.

Row k is what the ranks run as their k-th micro-batch, a `Cell` one rank's part of it. Shared
sequences come first, longest first, so that the blocks of a row last about equally long: each takes
the first row with enough free ranks, and of these the ones that grow least by it. In a pipeline
they are those with another heavy row, since only the longest makes a rank's bubble. Whole sequences
fill the cells (`row_fill`). How wide blocks are and how many rows there may be is tried, and
`predict` decides.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from parallel.plan.bound import bound_seconds, with_bubble
from parallel.plan.candidates import Candidate, make_candidates
from parallel.plan.cost import CostModel
from parallel.plan.cuts import even_cut
from parallel.plan.offload_ratio import HostMemory, fewest_ranks
from parallel.plan.predict import predict
from parallel.plan.records import MicroBatch, Piece, StepPlan
from parallel.plan.row_fill import Cell, RowCost, fill_rows


class _Way(NamedTuple):
    """How to make one of the plans that are tried."""

    communication_share: float
    """What its exchange may cost of a sequence's work. Wide blocks make short bubbles."""
    spare_rows: int
    """Rows that ranks may open beyond the fewest."""


_ANY = 1 << 30
_WAYS = (_Way(0.01, 0), _Way(0.0, 0), _Way(0.01, _ANY), _Way(0.05, 0), _Way(0.01, 1))
"""The likeliest first."""
# Sequences placed, of all tries together, after which the best is taken; two tries there are.
_EFFORT = 20_000
# A step this much over the bound is taken at once.
_GOOD_ENOUGH = 1.01


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLimits:
    """What a plan of rows must keep to."""

    num_ranks: int
    tokens_per_rank: int
    num_pipeline_stages: int = 1
    num_micro_batches_multiple: int = 1
    expert_parallel_size: int = 1


def plan_rows(
    lengths: Sequence[int],
    limits: RowLimits,
    cost_model: CostModel,
    host_memory: HostMemory | None = None,
) -> StepPlan:
    """Plan a step of sequences that the ranks can hold."""
    best: tuple[float, StepPlan] | None = None
    effort = -len(lengths)
    for way in _WAYS:
        if way.spare_rows and limits.num_pipeline_stages == 1:
            # Rows that are not padded cost nothing, so there is no limit to spare.
            continue
        plan = _Rows(lengths, limits, cost_model, host_memory, way).plan()
        found = predict(
            plan,
            cost_model,
            num_pipeline_stages=limits.num_pipeline_stages,
            expert_parallel_size=limits.expert_parallel_size,
            max_ranks_per_sequence=limits.num_ranks,
        )
        if best is None or found.step_seconds < best[0]:
            best = (found.step_seconds, plan)
        effort += len(lengths)
        if found.step_seconds <= _GOOD_ENOUGH * found.bound_seconds or effort > _EFFORT:
            break
    assert best is not None
    return best[1]


class _Rows:
    """One try: the cells of all ranks."""

    def __init__(
        self,
        lengths: Sequence[int],
        limits: RowLimits,
        cost_model: CostModel,
        host_memory: HostMemory | None,
        way: _Way,
    ) -> None:
        self.way = way
        self.lengths = lengths
        self.limits = limits
        self.cost_model = cost_model
        self.host_memory = host_memory
        self.offloadable = host_memory.offloadable if host_memory else 0.0
        self.is_padded = limits.num_pipeline_stages > 1
        self.row_cost = RowCost.of(
            cost_model, capacity=limits.tokens_per_rank, is_padded=self.is_padded
        )
        self.columns: list[list[Cell]] = [[] for _ in range(limits.num_ranks)]
        self.ulysses: list[int] = []
        # Of each row with shared sequences, which ranks are in a block.
        self.taken: list[npt.NDArray[np.bool_]] = []
        self.busy = np.zeros(limits.num_ranks)
        self.longest = np.zeros(limits.num_ranks)
        self.bound = bound_seconds(
            lengths,
            cost_model,
            num_ranks=limits.num_ranks,
            tokens_per_rank=limits.tokens_per_rank,
        )
        self.target = with_bubble(
            self.bound,
            lengths,
            cost_model,
            num_ranks=limits.num_ranks,
            num_pipeline_stages=limits.num_pipeline_stages,
            num_micro_batches=self._fewest_rows(),
        )

    def plan(self) -> StepPlan:
        limits = self.limits
        length = np.asarray(self.lengths, dtype=np.int64)
        longest_first = np.argsort(-length, kind="stable").tolist()
        num_shared = int((length > limits.tokens_per_rank).sum())
        for candidate in self._candidates(longest_first[:num_shared]):
            self._place(candidate)
        max_rows = max(len(self.taken), self._fewest_rows()) + self.way.spare_rows
        fill_rows(
            self.columns,
            longest_first[num_shared:],
            self.lengths,
            capacity=limits.tokens_per_rank,
            group_size=limits.expert_parallel_size,
            cost=self.row_cost,
            max_rows=max_rows if self.is_padded else len(self.lengths),
            bubble=limits.num_pipeline_stages - 1,
        )
        return StepPlan(
            lengths=tuple(self.lengths),
            tokens_per_rank=limits.tokens_per_rank,
            micro_batches=tuple(self._micro_batches()),
            ulysses=tuple(sorted(self.ulysses)),
            offloadable=self.offloadable,
        )

    def _candidates(self, shared: Sequence[int]) -> list[Candidate]:
        limits = self.limits
        lengths = [self.lengths[i] for i in shared]
        return make_candidates(
            shared,
            lengths,
            [self._fewest_ranks(length) for length in lengths],
            num_ranks=limits.num_ranks,
            cost_model=self.cost_model,
            communication_share=self.way.communication_share,
            against_idling=self.way.communication_share,
            target=self.bound,
        )

    def _fewest_ranks(self, length: int) -> int:
        limits = self.limits
        needed = -(-length // limits.tokens_per_rank)
        # Longer rows than C are padding on all others, so a pipeline offloads only what it must.
        if self.is_padded and needed <= limits.num_ranks:
            return needed
        return fewest_ranks(length, limits.tokens_per_rank, self.cost_model, self.host_memory)

    def _fewest_rows(self) -> int:
        """Rows of C tokens that hold everything."""
        per_row = self.limits.num_ranks * self.limits.tokens_per_rank
        return -(-sum(self.lengths) // per_row)

    def _place(self, candidate: Candidate) -> None:
        """A shared sequence into the first row in which enough ranks are free."""
        group = self.limits.expert_parallel_size
        count = candidate.most
        if count > group:
            # Whole groups of experts, so that none of their ranks waits in this row.
            count = min(-(-count // group) * group, candidate.limit)
        num_free = [self.limits.num_ranks - int(taken.sum()) for taken in self.taken]
        rows = (row for row, num in enumerate(num_free) if num >= candidate.fewest)
        row = next(rows, len(self.taken))
        if row == len(self.taken):
            self.taken.append(np.zeros(self.limits.num_ranks, dtype=bool))
        free = np.flatnonzero(~self.taken[row])
        ranks = self._choose(free, min(count, len(free)), candidate)
        self._add_block(candidate, row, ranks)

    def _choose(self, free: npt.NDArray[np.int64], count: int, candidate: Candidate) -> list[int]:
        """Of the free ranks those that grow least."""
        seconds = candidate.on(count)
        bubble = self.limits.num_pipeline_stages - 1
        longest = np.maximum(self.longest[free], seconds)
        after = self.busy[free] + seconds + bubble * longest
        group = self.limits.expert_parallel_size
        if group == 1:
            # Heavy rows go together, as long as that makes no rank late.
            growth = bubble * (longest - self.longest[free])
            growth += np.maximum(0.0, after - self.target) * len(self.busy)
            order = np.lexsort((free, after, growth))
        else:
            number = free // group
            num_free = np.bincount(number)[number]
            latest = np.zeros(int(number.max()) + 1)
            np.maximum.at(latest, number, after)
            # Groups with enough free ranks first, then the idlest; a group stays together.
            order = np.lexsort((free, number, latest[number], -np.minimum(num_free, count)))
        return sorted(free[order[:count]].tolist())

    def _add_block(self, candidate: Candidate, row: int, ranks: Sequence[int]) -> None:
        sequence, count = candidate.sequence, len(ranks)
        length = self.lengths[sequence]
        if self.cost_model.prefers_ulysses(length, count):
            self.ulysses.append(sequence)
        self.taken[row][ranks] = True
        self.busy[ranks] += candidate.on(count)
        self.longest[ranks] = np.maximum(self.longest[ranks], candidate.on(count))
        pieces = even_cut(sequence, length, count)
        # Beyond what each row costs anyway: g, and in a pipeline the linear time.
        seconds = candidate.on(count) - self.cost_model.fixed_seconds
        if self.is_padded:
            seconds -= self.cost_model.linear_seconds * length / count
        for rank, part in zip(ranks, pieces, strict=True):
            column = self.columns[rank]
            while len(column) <= row:
                column.append(Cell(self.limits.tokens_per_rank))
            column[row].shared += part
            column[row].room -= sum(piece.num_tokens for piece in part)
            column[row].seconds += max(0.0, seconds)

    def _micro_batches(self) -> Iterator[tuple[MicroBatch, ...]]:
        """Of each rank, filled up with empty ones where others or the pipeline need it."""
        limits = self.limits
        group, multiple = limits.expert_parallel_size, limits.num_micro_batches_multiple
        fewest = 1 if multiple > 1 else 0
        for rank, column in enumerate(self.columns):
            first = rank - rank % group
            longest = max(fewest, *map(len, self.columns[first : first + group]))
            count = -(-longest // multiple) * multiple
            cells = [self._micro_batch(cell) for cell in column]
            yield (*cells, *[MicroBatch()] * (count - len(cells)))

    def _micro_batch(self, cell: Cell) -> MicroBatch:
        whole = [Piece(i, 0, self.lengths[i]) for i in sorted(cell.whole)]
        ratio = 0.0
        if self.host_memory is not None and cell.room < 0:
            capacity = self.limits.tokens_per_rank
            ratio = self.host_memory.ratio(capacity - cell.room, tokens_per_rank=capacity)
        return MicroBatch((*whole, *cell.shared), ratio)
