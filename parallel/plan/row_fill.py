"""Whole sequences into the cells of rows: the rows that are needed, and what goes where.

A *cell* is one rank's part of one row. In a pipeline all rows are padded to one length, so a cell
costs c = b L + g however full it is and a sequence adds only its attention a s^2. So:

1. Rows are opened one by one, for the group that would end first, until all tokens have room;
   groups with heavy rows get fewer of them (PP-balance; ByteScale, arXiv 2502.21231, section 6.2).
2. Long sequences, whose attention counts, go to the group that would end first; within it to the
   row with most room, E of like length side by side, since the slowest cell of a row counts.
3. The others go where there is most room, which keeps L small.
"""

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from parallel.plan.row_slots import Blocks, RowTimes

# Attention of sequences shorter than this part of a row does not count.
_SHORT = 0.25


class Cells:
    """All cells of a try; cell e of row k of group g is cells[g][k][e]."""

    def __init__(
        self,
        blocks: Blocks,
        lengths: Sequence[int],
        *,
        group_size: int,
        capacity: int,
        times: RowTimes,
        multiple: int = 1,
    ) -> None:
        self.lengths = lengths
        self.multiple = multiple
        self.group_size = group_size
        self.capacity = capacity
        self.times = times
        self.num_rows: list[int] = blocks.num_rows.tolist()
        with_slot = np.zeros(len(self.num_rows))
        for slot in blocks.slots:
            with_slot[slot.groups] += 1
        # What rows hold is counted when it comes.
        empty = (blocks.num_rows - with_slot) * (times.filled_seconds - times.row_seconds)
        self.end: list[float] = (blocks.clock - empty).tolist()
        self.longest: list[float] = blocks.longest.tolist()
        """Seconds of each group's longest row."""
        self.room = [[[capacity] * group_size for _ in range(n)] for n in self.num_rows]
        self.whole: list[list[list[list[int]]]] = [
            [[[] for _ in range(group_size)] for _ in range(n)] for n in self.num_rows
        ]
        self.slowest = [[0.0] * n for n in self.num_rows]
        """Of each row, beyond c."""
        self.attention = [[[0.0] * group_size for _ in range(n)] for n in self.num_rows]
        for slot in blocks.slots:
            for group in slot.groups:
                self.slowest[group][slot.row] = slot.seconds
            for sequence, ranks in slot.blocks:
                share = -(-lengths[sequence] // len(ranks))
                for rank in ranks:
                    group, place = divmod(rank, group_size)
                    self.room[group][slot.row][place] -= share
                    self.attention[group][slot.row][place] = slot.seconds

    def finish(self, group: int) -> float:
        """When a group's last stage would be through."""
        return self.end[group] + self.times.bubble * self.longest[group]

    def by_finish(self) -> list[tuple[float, int]]:
        """A heap of all groups."""
        groups = [(self.finish(group), group) for group in range(len(self.num_rows))]
        heapq.heapify(groups)
        return groups

    def open_rows(self, group: int) -> range:
        """As many rows as must be opened at once; returns which."""
        first, size = self.num_rows[group], self.group_size
        self.num_rows[group] += self.multiple
        self.longest[group] = max(self.longest[group], self.times.row_seconds)
        for _ in range(self.multiple):
            self.end[group] += self.times.row_seconds
            self.room[group].append([self.capacity] * size)
            self.whole[group].append([[] for _ in range(size)])
            self.slowest[group].append(0.0)
            self.attention[group].append([0.0] * size)
        return range(first, self.num_rows[group])

    def put(self, group: int, row: int, place: int, sequence: int, seconds: float) -> None:
        self.whole[group][row][place].append(sequence)
        self.room[group][row][place] -= self.lengths[sequence]
        cell = self.attention[group][row]
        cell[place] += seconds
        growth = cell[place] - self.slowest[group][row]
        if growth > 0:
            self.slowest[group][row] += growth
            self.end[group] += growth
            lasts = self.times.row_seconds + self.slowest[group][row]
            self.longest[group] = max(self.longest[group], lasts)


def fill_cells(
    cells: Cells, whole: Sequence[int], attention: Sequence[float], *, short_tokens: float
) -> None:
    """Place `whole`, longest first; `attention` are seconds, indexed by sequence."""
    lengths, size = cells.lengths, cells.group_size
    num_long = 0
    while num_long < len(whole) and lengths[whole[num_long]] > _SHORT * short_tokens:
        num_long += 1
    groups = cells.by_finish()
    # Groups without room for sequences as long as those that come now, the roomiest first.
    tight: list[tuple[int, int]] = []
    left: list[int] = []
    for first in range(0, num_long, size):
        chunk = whole[first : min(first + size, num_long)]
        if not _put_beside(cells, groups, tight, chunk, attention):
            left += chunk
    left += whole[num_long:]
    _put_where_room_is(cells, left, attention)


def _put_beside(
    cells: Cells,
    groups: list[tuple[float, int]],
    tight: list[tuple[int, int]],
    chunk: Sequence[int],
    attention: Sequence[float],
) -> bool:
    """Up to E sequences into one row of the group that ends first and has room for them."""
    longest = cells.lengths[chunk[0]]
    while tight and -tight[0][0] >= longest:
        _, group = heapq.heappop(tight)
        heapq.heappush(groups, (cells.finish(group), group))
    while groups:
        group = groups[0][1]
        rooms = [min(row) for row in cells.room[group]]
        most = max(rooms, default=0)
        if most < longest:
            heapq.heappop(groups)
            heapq.heappush(tight, (-most, group))
            continue
        row = rooms.index(most)
        cell = cells.attention[group][row]
        order = sorted(range(cells.group_size), key=cell.__getitem__)
        for place, sequence in zip(order, chunk, strict=False):
            cells.put(group, row, place, sequence, attention[sequence])
        heapq.heapreplace(groups, (cells.finish(group), group))
        return True
    return False


def _put_where_room_is(cells: Cells, sequences: Sequence[int], attention: Sequence[float]) -> None:
    """Each sequence into the emptiest cell; more rows where none has room."""
    rooms = [
        (-room, group, row, place)
        for group, rows in enumerate(cells.room)
        for row, cell in enumerate(rows)
        for place, room in enumerate(cell)
        if room > 0
    ]
    heapq.heapify(rooms)
    groups = cells.by_finish()
    for sequence in sequences:
        length = cells.lengths[sequence]
        if not rooms or -rooms[0][0] < length:
            group = _ends_first(cells, groups)
            for row in cells.open_rows(group):
                for place in range(cells.group_size):
                    heapq.heappush(rooms, (-cells.capacity, group, row, place))
        room, group, row, place = rooms[0]
        heapq.heapreplace(rooms, (room + length, group, row, place))
        cells.put(group, row, place, sequence, attention[sequence])


def _ends_first(cells: Cells, groups: list[tuple[float, int]]) -> int:
    """The group that would end first, by a heap of how that was: it never becomes earlier."""
    seconds, group = groups[0]
    while seconds < cells.finish(group):
        heapq.heapreplace(groups, (cells.finish(group), group))
        seconds, group = groups[0]
    return group


def open_rows(
    blocks: Blocks,
    num_tokens: int,
    *,
    group_size: int,
    row_tokens: int,
    used_tokens: int,
    times: RowTimes,
    multiple: int,
) -> float:
    """Rows enough for `num_tokens`, beside blocks that use `used_tokens` of theirs.

    Returns when the last stage of all would be through if they are filled evenly.
    """
    counts, filled_seconds, bubble = blocks.num_rows, times.filled_seconds, times.bubble
    rounded = -(-np.maximum(counts, 1 if multiple > 1 else 0) // multiple) * multiple
    clock = blocks.clock + (rounded - counts) * filled_seconds
    blocks.longest = np.where(rounded > 0, np.maximum(blocks.longest, filled_seconds), 0.0)
    per_row = group_size * row_tokens
    missing = num_tokens + used_tokens - int(rounded.sum()) * per_row
    num_more = max(0, -(-missing // (per_row * multiple)))
    step = multiple * filled_seconds
    finish = clock + bubble * np.maximum(blocks.longest, filled_seconds)
    more = _water(finish, step, num_more)
    blocks.num_rows = rounded + more * multiple
    blocks.clock = clock + more * step
    opened = blocks.num_rows > 0
    blocks.longest = np.where(opened, np.maximum(blocks.longest, filled_seconds), 0.0)
    return float((blocks.clock + bubble * blocks.longest).max(initial=0.0))


def _water(level: npt.NDArray[np.float64], step: float, num: int) -> npt.NDArray[np.int64]:
    """How often each is raised by `step` if `num` times the lowest is."""
    if not num:
        return np.zeros(len(level), dtype=np.int64)
    low, high = float(level.min()), float(level.max()) + step * (num / len(level) + 1)
    # The highest water at which no more than num steps are under it.
    for _ in range(40):
        middle = (low + high) / 2
        if int(np.ceil(np.maximum(middle - level, 0.0) / step).sum()) <= num:
            low = middle
        else:
            high = middle
    more = np.ceil(np.maximum(low - level, 0.0) / step).astype(np.int64)
    rest = num - int(more.sum())
    order = np.argsort(level + more * step, kind="stable")
    more[order[:rest]] += 1
    return more
