"""Whole sequences into the cells of rows, costliest first, each to the group that has least to do.

A group is one rank, or the ranks of one group of experts, which wait for each other in every row:
its time is the sum over its rows of the slowest cell. A sequence goes where its row's slowest cell
grows least, so nothing is lost while it fits beside a longer one (DP-Balance). In a pipeline rows
are padded: each costs the linear time of C tokens however full it is, and a sequence only adds its
attention. So rows are filled before new ones are opened, and groups with heavy rows get fewer of
them (PP-Balance; ByteScale, section 6.2).
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from parallel.plan.cost import CostModel
from parallel.plan.records import Piece

# So many groups are asked for room before the roomiest is taken.
_NUM_LOOKS = 4


@dataclass(slots=True)
class Cell:
    """One rank's part of one row."""

    room: int
    """Tokens that still fit."""
    seconds: float = 0.0
    """Beyond what each row costs."""
    shared: list[Piece] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RowCost:
    """What rows and sequences cost where all rows are padded, and where none is."""

    per_row: float
    per_token: float
    per_square: float

    @classmethod
    def of(cls, cost_model: CostModel, *, capacity: int, is_padded: bool) -> "RowCost":
        """capacity: tokens of a padded row."""
        linear = cost_model.linear_seconds
        return cls(
            per_row=cost_model.fixed_seconds + (linear * capacity if is_padded else 0.0),
            per_token=0.0 if is_padded else linear,
            per_square=cost_model.quadratic_seconds,
        )

    def sequence_seconds(self, length: int) -> float:
        """What a whole sequence adds to its cell."""
        return (self.per_square * length + self.per_token) * length


def fill_rows(
    columns: Sequence[list[Cell]],
    whole: Sequence[int],
    lengths: Sequence[int],
    *,
    capacity: int,
    group_size: int,
    cost: RowCost,
    max_rows: int,
    bubble: int,
) -> None:
    """Place `whole`, longest first, in the columns of all ranks.

    A group opens no more than max_rows rows while another has room. bubble: how many times the
    longest row of a group is paid besides.
    """
    groups = [
        _Group(list(columns[first : first + group_size]), capacity)
        for first in range(0, len(columns), group_size)
    ]
    heap = [
        (
            group.seconds
            + cost.per_row * group.num_rows
            + bubble * max(group.slowest, default=0.0),
            i,
        )
        for i, group in enumerate(groups)
    ]
    time_of = [time for time, _ in heap]
    heapq.heapify(heap)
    rooms = [(-group.most_room, i) for i, group in enumerate(groups)]
    heapq.heapify(rooms)
    for sequence in whole:
        length = lengths[sequence]
        seconds = cost.sequence_seconds(length)
        number = _next_group(
            heap,
            rooms,
            groups,
            time_of,
            length=length,
            seconds=seconds,
            cost=cost,
            max_rows=max_rows,
        )
        group = groups[number]
        before = group.seconds
        place = group.find(length, seconds)
        if place is None:
            place = group.open_row()
            time_of[number] += cost.per_row
        group.add(place, sequence, length, seconds)
        time_of[number] += group.seconds - before
        heapq.heappush(heap, (time_of[number], number))
        heapq.heappush(rooms, (-group.most_room, number))


def _next_group(
    heap: list[tuple[float, int]],
    rooms: list[tuple[int, int]],
    groups: Sequence["_Group"],
    time_of: Sequence[float],
    *,
    length: int,
    seconds: float,
    cost: RowCost,
    max_rows: int,
) -> int:
    """The group that is done first with the sequence, of the least busy few that can take it.

    If none of those has room, the roomiest; if that has none either, the least busy. Both heaps
    hold outdated entries of groups that have been filled since.
    """
    passed: list[tuple[float, int]] = []
    found, earliest = -1, float("inf")
    while heap and len(passed) < _NUM_LOOKS:
        time, number = heap[0]
        if time != time_of[number]:
            heapq.heappop(heap)
            continue
        if time >= earliest:
            # Later ones could not be done sooner.
            break
        passed.append(heapq.heappop(heap))
        group = groups[number]
        if group.most_room >= length:
            place = group.find(length, seconds)
            assert place is not None
            growth = group.growth(place, seconds)
        elif group.num_rows < max_rows:
            growth = cost.per_row + seconds
        else:
            continue
        if time + growth < earliest:
            found, earliest = number, time + growth
    least_busy = passed[0][1]
    for entry in passed:
        heapq.heappush(heap, entry)
    while found < 0:
        room, number = rooms[0]
        if -room != groups[number].most_room:
            heapq.heappop(rooms)
        elif -room >= length:
            found = number
        else:
            found = least_busy
    return found


class _Group:
    """Ranks that wait for each other in every row."""

    def __init__(self, columns: list[list[Cell]], capacity: int) -> None:
        self.columns = columns
        self.capacity = capacity
        self.slowest: list[float] = []
        for _ in range(max(map(len, columns))):
            self.open_row()

    @property
    def most_room(self) -> int:
        """Tokens that the emptiest cell can take."""
        return max((cell.room for column in self.columns for cell in column), default=0)

    @property
    def num_rows(self) -> int:
        return len(self.slowest)

    @property
    def seconds(self) -> float:
        """Beyond what each row costs."""
        return sum(self.slowest)

    def open_row(self) -> tuple[int, int]:
        """One more row; its first cell as (place in the group, row)."""
        row = len(self.slowest)
        for column in self.columns:
            if len(column) == row:
                column.append(Cell(self.capacity))
        self.slowest.append(max(column[row].seconds for column in self.columns))
        return 0, row

    def find(self, length: int, seconds: float) -> tuple[int, int] | None:
        """The cell with room where the row grows least; of equals the one with the least room."""
        best = None
        best_growth, best_room = float("inf"), 0
        for place, column in enumerate(self.columns):
            for row, cell in enumerate(column):
                if cell.room < length:
                    continue
                growth = self.growth((place, row), seconds)
                if growth < best_growth or (growth == best_growth and cell.room < best_room):
                    best, best_growth, best_room = (place, row), growth, cell.room
        return best

    def growth(self, place: tuple[int, int], seconds: float) -> float:
        """What the group takes longer if a cell does."""
        rank, row = place
        return max(0.0, self.columns[rank][row].seconds + seconds - self.slowest[row])

    def add(self, place: tuple[int, int], sequence: int, length: int, seconds: float) -> None:
        """Take a sequence into a cell."""
        cell = self.columns[place[0]][place[1]]
        cell.whole.append(sequence)
        cell.room -= length
        cell.seconds += seconds
        self.slowest[place[1]] = max(self.slowest[place[1]], cell.seconds)
