"""Light shared rows: row by row, on groups that have time for one more.

A group that has run fewer rows before a shared one fills them with whole sequences, so it is ready
for row k after

    clock + (k - rows that it has) x seconds of a filled row

and the groups of a slot should be ready at about the same time. Where no group has time, all get
more; where none are ready together, all wait longer.
"""

from collections.abc import Sequence

import numpy as np

from parallel.plan.row_slots import Blocks, RowTimes, Slot, Unit

# Of a filled row: what a group may wait for a light row.
_PATIENCE = 0.6
# Over the last, the next target if there is no time left.
_LATER = 1.05
# Units that do not fit a row before the next row is looked at.
_NUM_LOOKS = 16


def spread(
    blocks: Blocks, units: Sequence[Unit], *, group_size: int, times: RowTimes, target: float
) -> None:
    """Give each unit its row and groups; target: seconds after which a group is late."""
    spreading = _Spreading(blocks, times, group_size)
    spreading.run(units, target)
    spreading.write_back(blocks)


class _Spreading:
    """The clocks of all groups: lists, since most units are on few groups."""

    def __init__(self, blocks: Blocks, times: RowTimes, group_size: int) -> None:
        self.times = times
        self.group_size = group_size
        self.clock: list[float] = blocks.clock.tolist()
        self.num_rows: list[int] = blocks.num_rows.tolist()
        self.longest: list[float] = blocks.longest.tolist()
        self.patience = _PATIENCE * times.filled_seconds
        self.slots: list[Slot] = []

    def write_back(self, blocks: Blocks) -> None:
        blocks.clock, blocks.longest = np.array(self.clock), np.array(self.longest)
        blocks.num_rows = np.array(self.num_rows, dtype=np.int64)
        blocks.slots += self.slots

    def run(self, units: Sequence[Unit], target: float) -> None:
        left, row = list(units), min(self.num_rows)
        most = self._most_rows(target)
        while left:
            free = [group for group, num in enumerate(most) if self.num_rows[group] <= row < num]
            rest = self._fill_row(left, row, free)
            if len(rest) < len(left) or row < max(self.num_rows):
                left, row = rest, row + 1
            elif len(free) == len(most):
                # A later row has no other groups.
                self.patience *= 2
            else:
                row, target = min(self.num_rows), _LATER * target
                most = self._most_rows(target)

    def _most_rows(self, target: float) -> list[int]:
        """Up to how many rows each group may have if all is to be through by then."""
        filled, bubble = self.times.filled_seconds, self.times.bubble
        return [
            num + max(0, int((target - bubble * max(slowest, filled) - busy) / filled))
            for num, busy, slowest in zip(self.num_rows, self.clock, self.longest, strict=True)
        ]

    def _fill_row(self, units: list[Unit], row: int, free: Sequence[int]) -> list[Unit]:
        """Place what fits on these groups; returns the others."""
        filled = self.times.filled_seconds
        ready = [
            (self.clock[group] + (row - self.num_rows[group]) * filled, group) for group in free
        ]
        ready.sort()
        first = 0
        passed: list[Unit] = []
        for place, unit in enumerate(units):
            begin, end = first, first + unit.num_groups
            # Who would wait for long takes no part.
            while end <= len(ready) and ready[end - 1][0] - ready[begin][0] > self.patience:
                begin, end = begin + 1, end + 1
            if end <= len(ready):
                self._put(unit, row, [group for _, group in ready[begin:end]], ready[end - 1][0])
                first = end
                continue
            passed.append(unit)
            if first == len(ready) or len(passed) > _NUM_LOOKS:
                return passed + units[place + 1 :]
        return passed

    def _put(self, unit: Unit, row: int, groups: list[int], start: float) -> None:
        groups.sort()
        lasts = self.times.row_seconds + unit.seconds
        for group in groups:
            self.clock[group], self.num_rows[group] = start + lasts, row + 1
            self.longest[group] = max(self.longest[group], lasts)
        self.slots.append(Slot.of(unit, groups, row, group_size=self.group_size))
