"""Plans of rows for a pipeline: a meeting has one index on all its ranks, all rows one length.

A step of p stages takes, on each rank, its rows and p - 1 times the longest of them. Short rows
make short bubbles but spread more sequences over more ranks, so the length L of the rows is chosen,
up to the C tokens that fit, and with it who shares what (`row_blocks`). The bound's own rows
(`pipeline_bound`) are where the search starts: of some tries the most promising are filled
(`row_fill`), and the one that ends first is the plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from parallel.plan.cost import CostModel
from parallel.plan.offload_ratio import HostMemory
from parallel.plan.pipeline_bound import RowBound, pipeline_bound
from parallel.plan.plan_writer import PlanWriter
from parallel.plan.records import StepPlan, most_tokens
from parallel.plan.row_blocks import place_in_rows
from parallel.plan.row_fill import Cells, fill_cells, open_rows
from parallel.plan.row_shares import BoolArray, FloatArray, IntArray, RowShape, Shares, share
from parallel.plan.row_slots import Blocks, RowTimes

# Rows may be filled so much over the length that all tokens ask for, so that whole sequences fit.
_SLACK = 1.03
# Of a sequence's attention, what its exchange may cost for the sake of shorter rows.
_EXCHANGE_SHARE = 0.02
# Over the bound: when all should be through. The first for every length of rows, the others for the
# best of them.
_TARGETS = (1.05, 1.0, 1.1)
# Numbers of rows that are tried, over the bound's.
_ROW_COUNTS = (0.7, 0.85, 1.0)
# Of the step: what a row is taken to last at least, also where it costs nothing.
_LEAST_ROW = 1e-6
# Tries that are filled; all are placed.
_NUM_FILLED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLimits:
    """What a plan of rows must keep to."""

    num_ranks: int
    tokens_per_rank: int
    num_pipeline_stages: int = 1
    num_micro_batches_multiple: int = 1
    expert_parallel_size: int = 1


@dataclass(slots=True)
class _Try:
    """Shared sequences in their rows, and what the step might come to."""

    hope: float
    shape: RowShape
    times: RowTimes
    blocks: Blocks
    whole: list[int]
    """By place, longest first."""


def plan_rows(
    lengths: Sequence[int],
    limits: RowLimits,
    cost_model: CostModel,
    host_memory: HostMemory | None = None,
) -> StepPlan:
    """Plan a step of sequences that the ranks can hold."""
    step = _Step(lengths, limits, cost_model, host_memory)
    if not lengths:
        return step.build(Blocks.none(1), None)
    tries = step.tries()
    found: list[tuple[float, int, Blocks, Cells]] = []
    for one in tries[:_NUM_FILLED]:
        if found and found[0][0] <= one.hope:
            break
        cells = step.fill(one)
        found.append((step.seconds(one.blocks, cells), len(found), one.blocks, cells))
    _, _, blocks, cells = min(found, key=lambda entry: entry[:2])
    return step.build(blocks, cells)


class _Step:
    """The sequences, longest first, and what they cost."""

    def __init__(
        self,
        lengths: Sequence[int],
        limits: RowLimits,
        cost_model: CostModel,
        host_memory: HostMemory | None,
    ) -> None:
        self.limits = limits
        self.cost = cost_model
        self.host_memory = host_memory
        self.bubble = limits.num_pipeline_stages - 1
        length = np.asarray(lengths, dtype=np.int64)
        self.order: list[int] = np.argsort(-length, kind="stable").tolist()
        self.sorted: IntArray = length[self.order]
        self.lengths: list[int] = self.sorted.tolist()
        self.given = tuple(lengths)
        self.num_tokens = int(length.sum())
        squares = self.sorted.astype(np.float64) ** 2
        self.attention: FloatArray = cost_model.quadratic_seconds * squares
        self.attention_list: list[float] = self.attention.tolist()

    def tries(self) -> list[_Try]:
        """Several lengths of rows, and for the best of them several targets; the best first."""
        limits = self.limits
        offloadable = self.host_memory.offloadable if self.host_memory else 0.0
        bound = pipeline_bound(
            self.lengths,
            self.cost,
            num_ranks=limits.num_ranks,
            tokens_per_rank=most_tokens(limits.tokens_per_rank, offloadable),
            max_ranks_per_sequence=limits.num_ranks,
            num_pipeline_stages=max(2, limits.num_pipeline_stages),
        )
        found = [
            self._try(row_tokens, bound, _TARGETS[0]) for row_tokens in self._row_lengths(bound)
        ]
        best = min(found, key=lambda one: one.hope).shape.row_tokens
        found += [self._try(best, bound, target) for target in _TARGETS[1:]]
        return sorted(found, key=lambda one: one.hope)

    def _row_lengths(self, bound: RowBound) -> list[int]:
        """Around the bound's, whole numbers of rows; longer ones, which share less, too."""
        limits = self.limits
        # No row is shorter than the longest sequence on all ranks; it may need host memory there.
        shortest = -(-self.lengths[0] // limits.num_ranks)
        longest = max(shortest, limits.tokens_per_rank)
        multiple = limits.num_micro_batches_multiple
        per_rank = self.num_tokens / limits.num_ranks
        counts = {
            max(1, round(per_rank / bound.row_tokens / multiple * part)) * multiple
            for part in _ROW_COUNTS
        }
        found = {min(max(int(per_rank / count * 1.005) + 1, shortest), longest) for count in counts}
        # Half of the tokens are in sequences that such rows hold.
        middle = int(np.searchsorted(np.cumsum(self.sorted), self.num_tokens / 2))
        common = min(max(self.lengths[middle], shortest), longest)
        return sorted({*found, common, longest})

    def _try(self, row_tokens: int, bound: RowBound, target: float) -> _Try:
        limits, cost = self.limits, self.cost
        row_seconds = cost.fixed_seconds + cost.linear_seconds * row_tokens
        shape = RowShape(
            row_tokens=row_tokens,
            level_seconds=max(bound.longest_seconds, row_seconds * 1.02),
            exchange_share=_EXCHANGE_SHARE,
        )
        group_size = limits.expert_parallel_size
        shares = share(self.sorted, cost, shape, num_ranks=limits.num_ranks, group_size=group_size)
        is_shared = np.zeros(len(self.sorted), dtype=bool)
        is_shared[shares.sequences] = True
        used_tokens = int(self.sorted[is_shared].sum()) + self._wasted(shares, is_shared, shape)
        filled = row_seconds + self._mean_attention(is_shared, shape)
        times = RowTimes(
            row_seconds=row_seconds,
            filled_seconds=max(filled, _LEAST_ROW * bound.seconds),
            bubble=self.bubble,
        )
        blocks = place_in_rows(
            shares,
            num_groups=limits.num_ranks // group_size,
            group_size=group_size,
            times=times,
            target=bound.seconds * target,
        )
        hope = open_rows(
            blocks,
            self.num_tokens - used_tokens,
            group_size=group_size,
            row_tokens=shape.row_tokens,
            used_tokens=used_tokens,
            times=times,
            multiple=limits.num_micro_batches_multiple,
        )
        return _Try(hope, shape, times, blocks, np.flatnonzero(~is_shared).tolist())

    def _wasted(self, shares: Shares, is_shared: BoolArray, shape: RowShape) -> int:
        """Tokens of room beside shared sequences for which there is no sequence short enough."""
        length = self.sorted[shares.sequences]
        room = shape.row_tokens - length / shares.num_ranks
        total = float((room * shares.num_ranks).sum())
        if not total > 0:
            return 0
        # Whole sequences as long as half of the mean room still fit well.
        mean = total / float(shares.num_ranks.sum())
        short = self.sorted[~is_shared & (self.sorted <= mean / 2)]
        return max(0, int(total) - int(short.sum()))

    def _mean_attention(self, is_shared: BoolArray, shape: RowShape) -> float:
        """Of a row of whole sequences."""
        whole = ~is_shared
        tokens = int(self.sorted[whole].sum())
        return float(self.attention[whole].sum()) * shape.row_tokens / max(tokens, 1)

    def fill(self, one: _Try) -> Cells:
        """Whole sequences into the rows of a try."""
        row_tokens = one.shape.row_tokens
        cells = Cells(
            one.blocks,
            self.lengths,
            group_size=self.limits.expert_parallel_size,
            capacity=max(min(int(row_tokens * _SLACK), self.limits.tokens_per_rank), 1),
            times=one.times,
            multiple=self.limits.num_micro_batches_multiple,
        )
        fill_cells(cells, one.whole, self.attention_list, short_tokens=row_tokens)
        return cells

    def seconds(self, blocks: Blocks, cells: Cells) -> float:
        """The step, as `predict` will say."""
        longest = max((cells.capacity - min(row) for rows in cells.room for row in rows), default=0)
        per_row = self.cost.fixed_seconds + self.cost.linear_seconds * longest
        num_rows = max(cells.num_rows)
        durations = np.zeros((num_rows, len(cells.num_rows)))
        for group, slowest in enumerate(cells.slowest):
            durations[: len(slowest), group] = np.asarray(slowest) + per_row
        clock = np.zeros(len(cells.num_rows))
        longest_row = np.zeros(len(cells.num_rows))
        by_row: list[list[list[int]]] = [[] for _ in range(num_rows)]
        for slot in blocks.slots:
            if len(slot.groups) > 1:
                by_row[slot.row].append(slot.groups)
        for row, together in zip(durations, by_row, strict=True):
            for groups in together:
                clock[groups] = clock[groups].max()
                row[groups] = row[groups].max()
            clock += row
            longest_row = np.maximum(longest_row, row)
        return float((clock + self.bubble * longest_row).max())

    def build(self, blocks: Blocks, cells: Cells | None) -> StepPlan:
        """Cut and write down."""
        limits = self.limits
        size, multiple = limits.expert_parallel_size, limits.num_micro_batches_multiple
        writer = PlanWriter(
            self.given, limits.num_ranks, limits.tokens_per_rank, self.cost, self.host_memory
        )
        for rank, rows in enumerate(writer.rows):
            group, place = divmod(rank, size)
            for inside in cells.whole[group] if cells else ():
                rows.append(writer.whole(self.order[i] for i in inside[place]))
            # A pipeline that wants a multiple wants it of every rank, also of one without work.
            writer.fill_up(rank, multiple if multiple > 1 else 0)
        for slot in blocks.slots:
            for place, ranks in slot.blocks:
                parts = writer.cut(self.order[place], len(ranks))
                for rank, part in zip(ranks, parts, strict=True):
                    writer.rows[rank][slot.row] += part
        return writer.plan()
