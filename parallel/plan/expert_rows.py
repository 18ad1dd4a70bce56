"""Plans for groups of experts without a pipeline: groups in place of ranks, rows inside them.

The E ranks of a group of experts wait for each other in every layer of every micro-batch, so a
group is busy for the sum over its rows of the slowest of E cells. Seen from outside it is one rank
that is E times as quick, and sequences over whole groups are laid out like shared sequences over
ranks (`blocks`). Inside a group:

- sequences over fewer ranks stand beside each other in one row (a *bundle*), the slowest first;
- so do the longest of the whole ones, E of like length;
- bundles go to the group with the most time left (`fill`);
- what time is left then is cut into rows of equal length, and all other sequences fill cells,
  costliest first, each where most time is left: the smallest come last and level the cells.

Rows are not padded here, and one more costs g only; so rows are many and need not be full.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from parallel.plan.blocks import Schedule, Style, place_blocks
from parallel.plan.bound import bound_seconds
from parallel.plan.candidates import Candidate, make_candidates
from parallel.plan.cost import CostModel
from parallel.plan.expert_cells import Cell, Row, fill_cells, level_of
from parallel.plan.fill import fill
from parallel.plan.offload_ratio import HostMemory, fewest_ranks
from parallel.plan.plan_writer import PlanWriter
from parallel.plan.records import StepPlan, most_tokens
from parallel.plan.row_shares import FloatArray, IntArray, Shares, bundle

# A plan this much over the bound is taken at once.
_GOOD_ENOUGH = 1.01
# Blocks may end this much after the bound, rather than take one more group for a hair.
_SLACK = 1.002
# How full of tokens a row should be that is opened for short sequences.
_FULL = 0.95
# Of the mean row: sequences that take longer stand beside others of their length.
_LONG = 0.8


class _Way(NamedTuple):
    """How to make one of the plans that are tried."""

    communication_share: float
    against_idling: float
    group_share: float
    """Of its work, what the exchange over a whole group may cost a sequence that needs less."""
    style: Style


_WAYS = (
    _Way(0.01, 0.05, 0.01, lambda _, even: even),
    _Way(0.01, 0.25, 0.0, lambda options, _: options[0]),
    _Way(0.05, 0.25, 0.05, lambda _, even: even),
    _Way(0.003, 0.05, 0.0, lambda options, _: options[len(options) // 2]),
)
"""The likeliest first."""


@dataclass(slots=True)
class _Try:
    """A schedule of groups, and the rows before its blocks and at their ends."""

    seconds: float
    schedule: Schedule
    in_gaps: list[list[Row]]
    at_end: list[list[Row]]


def plan_expert_rows(
    lengths: Sequence[int],
    *,
    num_ranks: int,
    tokens_per_rank: int,
    cost_model: CostModel,
    expert_parallel_size: int,
    host_memory: HostMemory | None = None,
) -> StepPlan:
    """Plan a step of sequences that the ranks can hold."""
    step = _Step(lengths, num_ranks, tokens_per_rank, cost_model, expert_parallel_size, host_memory)
    best: _Try | None = None
    for way in _WAYS:
        found = step.lay_out(way)
        if best is None or found.seconds < best.seconds:
            best = found
        if best.seconds <= _GOOD_ENOUGH * step.target:
            break
    assert best is not None
    return step.build(best)


class _Step:
    """The sequences, longest first, and what they cost."""

    def __init__(
        self,
        lengths: Sequence[int],
        num_ranks: int,
        tokens_per_rank: int,
        cost_model: CostModel,
        group_size: int,
        host_memory: HostMemory | None,
    ) -> None:
        self.num_ranks = num_ranks
        self.num_groups = num_ranks // group_size
        self.group_size = group_size
        self.capacity = tokens_per_rank
        self.cost = cost_model
        self.host_memory = host_memory
        self.given = tuple(lengths)
        length = np.asarray(lengths, dtype=np.int64)
        self.order: list[int] = np.argsort(-length, kind="stable").tolist()
        self.sorted: IntArray = length[self.order]
        self.lengths: list[int] = self.sorted.tolist()
        seconds: FloatArray = cost_model.lengths_seconds(self.lengths)
        self.seconds: list[float] = seconds.tolist()
        offloadable = host_memory.offloadable if host_memory else 0.0
        self.target = bound_seconds(
            lengths,
            cost_model,
            num_ranks=num_ranks,
            tokens_per_rank=most_tokens(tokens_per_rank, offloadable),
        )
        # Those that no rank can hold, or that take one rank too long.
        num_shared = int((length > tokens_per_rank).sum())
        num_slow = int((seconds > self.target).sum()) if num_ranks > 1 else 0
        self.num_shared = max(num_shared, num_slow)
        self.fewest = [
            max(
                fewest_ranks(one, tokens_per_rank, cost_model, host_memory),
                min(int(spent / self.target) + 1, one, num_ranks),
            )
            for one, spent in zip(
                self.lengths[: self.num_shared], self.seconds[: self.num_shared], strict=True
            )
        ]

    def lay_out(self, way: _Way) -> _Try:
        """Blocks, bundles, and rows of whole sequences."""
        large, small = self._split(way)
        schedule = place_blocks(
            self._candidates(large, way),
            num_ranks=self.num_groups,
            target=_SLACK * self.target,
            waiting_weight=0.5,
            style=way.style,
        )
        num_long = self._num_long()
        rows = [*self._bundles(small), *self._rows_of_long(num_long)]
        rows.sort(key=lambda row: -row.seconds)
        filled = fill(
            schedule,
            range(len(rows)),
            [row.seconds for row in rows],
            target=max(self.target, *schedule.busy),
        )
        in_gaps = [[rows[number] for number in numbers] for numbers in filled.in_gaps]
        at_end = [[rows[number] for number in numbers] for numbers in filled.at_end]
        self._open_rows(schedule, in_gaps, at_end, filled.busy, num_long)
        fill_cells(
            range(num_long, len(self.lengths)),
            self.lengths,
            self.seconds,
            in_gaps=in_gaps,
            at_end=at_end,
            busy=filled.busy,
            more=lambda: self._row(0.0),
        )
        ends = [
            busy + sum(row.lasts for row in inside)
            for busy, inside in zip(schedule.busy, at_end, strict=True)
        ]
        # What a gap was overfilled by comes on top of everything.
        late = max(
            (
                sum(row.lasts for row in inside) - gap.seconds
                for gap, inside in zip(schedule.gaps, in_gaps, strict=True)
            ),
            default=0.0,
        )
        return _Try(max(ends) + max(0.0, late), schedule, in_gaps, at_end)

    def _split(self, way: _Way) -> tuple[list[int], list[int]]:
        """Shared sequences over whole groups, and over a part of one."""
        size = self.group_size
        shared = self.sorted[: self.num_shared]
        fewest = np.asarray(self.fewest, dtype=np.int64)
        exchange = self.cost.exposed_seconds(shared, np.minimum(size, np.maximum(shared, 1))) * size
        work = np.asarray(self.seconds[: self.num_shared])
        is_large = (fewest * 2 > size) | (exchange <= way.group_share * work)
        is_large &= shared >= size
        is_large |= fewest > size
        return np.flatnonzero(is_large).tolist(), np.flatnonzero(~is_large).tolist()

    def _candidates(self, large: Sequence[int], way: _Way) -> list[Candidate]:
        return make_candidates(
            large,
            [self.lengths[i] for i in large],
            [self.fewest[i] for i in large],
            num_ranks=self.num_ranks,
            cost_model=self.cost,
            communication_share=way.communication_share,
            against_idling=way.against_idling,
            target=self.target,
            group_size=self.group_size,
        )

    def _bundles(self, small: Sequence[int]) -> Iterator[Row]:
        places = np.asarray(small, dtype=np.int64)
        ranks = np.asarray([self.fewest[i] for i in small], dtype=np.int64)
        seconds = self.cost.shared_seconds(self.sorted[places], ranks)
        order = np.lexsort((-ranks, -seconds))
        shares = Shares(places[order], ranks[order], seconds[order])
        lasts = dict(zip(shares.sequences.tolist(), shares.seconds.tolist(), strict=True))
        for slowest, members in bundle(shares, self.group_size):
            row = self._row(slowest)
            row.blocks = members
            first = 0
            for sequence, num_ranks in members:
                tokens = -(-self.lengths[sequence] // num_ranks)
                for cell in row.cells[first : first + num_ranks]:
                    cell.room -= tokens
                    cell.left -= lasts[sequence]
                first += num_ranks
            yield row

    def _row(self, seconds: float) -> Row:
        """An empty row that lasts so long, and g."""
        row = Row(seconds + self.cost.fixed_seconds, [])
        row.cells = [Cell(self.capacity, seconds) for _ in range(self.group_size)]
        return row

    def _num_long(self) -> int:
        """Up to where sequences, shared ones included, are too long to be dealt out singly."""
        limit = _LONG * self.capacity * self.cost.linear_seconds
        number = self.num_shared
        while number < len(self.seconds) and self.seconds[number] > limit:
            number += 1
        return number

    def _rows_of_long(self, num_long: int) -> Iterator[Row]:
        size = self.group_size
        for first in range(self.num_shared, num_long, size):
            row = self._row(self.seconds[first])
            for cell, sequence in zip(
                row.cells, range(first, min(first + size, num_long)), strict=False
            ):
                cell.whole.append(sequence)
                cell.room -= self.lengths[sequence]
                cell.left -= self.seconds[sequence]
            yield row

    def _open_rows(
        self,
        schedule: Schedule,
        in_gaps: list[list[Row]],
        at_end: list[list[Row]],
        busy: Sequence[float],
        num_long: int,
    ) -> None:
        """Rows of equal length for the sequences that are left, up to one level."""
        num_left, num_tokens = len(self.lengths) - num_long, sum(self.lengths[num_long:])
        if not num_left:
            return
        rest = sum(self.seconds[num_long:])
        longest_row = _FULL * self.capacity * rest / num_tokens
        for gap, inside in zip(schedule.gaps, in_gaps, strict=True):
            seconds = gap.seconds - sum(row.seconds for row in inside)
            self._open(inside, seconds, longest_row, most=num_left)
        slack = sum(
            min(max(0.0, cell.left), max(0, cell.room) * rest / num_tokens)
            for group in (*in_gaps, *at_end)
            for row in group
            for cell in row.cells
        )
        level = level_of(busy, max(0.0, rest - slack) / self.group_size)
        for group, inside in enumerate(at_end):
            self._open(inside, level - busy[group], longest_row, most=num_left)

    def _open(self, inside: list[Row], seconds: float, longest_row: float, *, most: int) -> None:
        """No more rows than there are sequences for them: a gap may last a thousand rows."""
        num_rows = min(-int(-seconds // (longest_row + self.cost.fixed_seconds)), most)
        for _ in range(num_rows):
            each = seconds / num_rows - self.cost.fixed_seconds
            if each > 0:
                inside.append(self._row(each))

    def build(self, chosen: _Try) -> StepPlan:
        """Rows in their order, empty ones where groups that meet have run fewer."""
        size = self.group_size
        writer = PlanWriter(self.given, self.num_ranks, self.capacity, self.cost, self.host_memory)
        before = {
            (gap.rank, gap.block): rows
            for gap, rows in zip(chosen.schedule.gaps, chosen.in_gaps, strict=True)
        }
        for number, block in enumerate(chosen.schedule.blocks):
            for group in block.ranks:
                for row in before.get((group, number), ()):
                    self._write(row, group, writer)
            ranks = [group * size + place for group in block.ranks for place in range(size)]
            index = max(len(writer.rows[rank]) for rank in ranks)
            parts = writer.cut(self.order[block.sequence], len(ranks))
            for rank, part in zip(ranks, parts, strict=True):
                writer.fill_up(rank, index)
                writer.rows[rank].append(list(part))
        for group, rows in enumerate(chosen.at_end):
            for row in rows:
                self._write(row, group, writer)
        return writer.plan()

    def _write(self, row: Row, group: int, writer: PlanWriter) -> None:
        if not row.blocks and not any(cell.whole for cell in row.cells):
            return
        first = group * self.group_size
        for rank, cell in enumerate(row.cells, start=first):
            writer.rows[rank].append(writer.whole(self.order[place] for place in cell.whole))
        for place, num_ranks in row.blocks:
            parts = writer.cut(self.order[place], num_ranks)
            for rank, part in enumerate(parts, start=first):
                writer.rows[rank][-1] += part
            first += num_ranks
