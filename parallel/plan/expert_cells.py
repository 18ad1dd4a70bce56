"""Rows of a group of experts, and whole sequences in their cells.

A row lasts as long as its slowest cell. Rows come with a length in seconds; whole sequences go,
longest first, each to the cell that has most time left, so that the smallest, which come last,
level what the others left.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Cell:
    """One rank's part of a row."""

    room: int
    """Tokens that still fit."""
    left: float
    """Seconds until its row ends."""
    whole: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Row:
    """What the ranks of one group run together."""

    seconds: float
    cells: list[Cell]
    blocks: list[tuple[int, int]] = field(default_factory=list)
    """(sequence, number of ranks), from the group's first rank on."""

    @property
    def lasts(self) -> float:
        """Seconds with what it was overfilled by."""
        return self.seconds - min(0.0, min(cell.left for cell in self.cells))


def fill_cells(
    whole: Sequence[int],
    lengths: Sequence[int],
    seconds: Sequence[float],
    *,
    in_gaps: Sequence[Sequence[Row]],
    at_end: Sequence[list[Row]],
    busy: Sequence[float],
    more: Callable[[], Row],
) -> None:
    """Place `whole`, longest first, in the rows of all groups.

    in_gaps, at_end: rows before blocks, and behind the last of each group. busy: seconds of each
    group. more: makes a row, for the group with the fewest where no cell has room.
    """
    cells = [cell for group in (*in_gaps, *at_end) for row in group for cell in row.cells]
    heap = [(-cell.left, number) for number, cell in enumerate(cells)]
    heapq.heapify(heap)
    # Cells without room for sequences as long as those that come now, the roomiest first.
    tight: list[tuple[int, int]] = []
    for sequence in whole:
        length = lengths[sequence]
        while tight and -tight[0][0] >= length:
            _, number = heapq.heappop(tight)
            heapq.heappush(heap, (-cells[number].left, number))
        while heap and cells[heap[0][1]].room < length:
            _, number = heapq.heappop(heap)
            heapq.heappush(tight, (-cells[number].room, number))
        if not heap:
            group = min(range(len(busy)), key=lambda one: (len(at_end[one]), busy[one]))
            row = more()
            at_end[group].append(row)
            for cell in row.cells:
                heapq.heappush(heap, (-cell.left, len(cells)))
                cells.append(cell)
        number = heap[0][1]
        cell = cells[number]
        cell.whole.append(sequence)
        cell.room -= length
        cell.left -= seconds[sequence]
        heapq.heapreplace(heap, (-cell.left, number))


def level_of(busy: Sequence[float], seconds: float) -> float:
    """Up to where groups that are so busy are filled by so many seconds of all of them."""
    level, below = 0.0, 0.0
    for number, one in enumerate(sorted(busy), start=1):
        if number > 1 and one * (number - 1) - below >= seconds:
            return (below + seconds) / (number - 1)
        below += one
        level = (below + seconds) / number
    return level
