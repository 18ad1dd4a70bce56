"""Shared sequences in rows: the ranks and the row of each.

Row k is what the ranks run as their k-th micro-batch. A *group* is one rank, or the ranks of one
group of experts, which run each row together. Heavy rows are stacked: the slowest first, each goes
to groups that have one as slow already, if they can still be through in time, so that the other
groups keep short bubbles. Light ones are spread row by row over the groups that have time, beside
others that would start about then.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from parallel.plan.row_shares import FloatArray, IntArray, Shares, bundle

# Over a row of whole sequences: rows that last so long are stacked on few groups.
_HEAVY = 1.25
# Of a row of whole sequences: what a group may wait for a light row.
_PATIENCE = 0.6
# Over the last, the next target if there is no time left.
_LATER = 1.05
# Slots that do not fit a row before the next row is looked at.
_NUM_LOOKS = 16


class Slot(NamedTuple):
    """A block of whole groups, or small blocks beside each other in one group."""

    row: int
    groups: list[int]
    blocks: list[tuple[int, list[int]]]
    """(sequence, its ranks)."""
    seconds: float
    """What the longest of them takes beyond c."""


@dataclass(slots=True)
class Blocks:
    """All slots, row by row, and what they leave of each group."""

    clock: FloatArray
    """[num_groups]: seconds until a group is through with the rows that have slots."""
    longest: FloatArray
    """[num_groups]: seconds of its longest row."""
    num_rows: IntArray
    """[num_groups]: rows that it must have to meet the others."""
    slots: list[Slot] = field(default_factory=list)


class _Unit(NamedTuple):
    """What becomes a slot."""

    num_groups: int
    seconds: float
    """Of the slowest block, beyond c."""
    members: list[tuple[int, int]]
    """(sequence, number of ranks), the slowest first."""


def _units(shares: Shares, group_size: int) -> list[_Unit]:
    """Blocks of whole groups and bundles of smaller ones, the slowest first."""
    is_small = shares.num_ranks < group_size
    large, small = shares.only(~is_small), shares.only(is_small)
    units = [
        _Unit(num_ranks // group_size, seconds, [(sequence, num_ranks)])
        for sequence, num_ranks, seconds in zip(*(part.tolist() for part in large), strict=True)
    ]
    units += [_Unit(1, *one) for one in bundle(small, group_size)]
    return sorted(units, key=lambda unit: -unit.seconds)


def place_in_rows(
    shares: Shares,
    *,
    num_groups: int,
    group_size: int,
    row_seconds: float,
    filled_seconds: float,
    bubble: int,
    target: float,
) -> Blocks:
    """Give each shared sequence its row and its ranks.

    row_seconds: c. filled_seconds: what a row of whole sequences takes. bubble: p - 1. target:
    seconds after which a group is late.
    """
    placing = _Placing(num_groups, group_size, row_seconds, filled_seconds, bubble, target)
    units = _units(shares, group_size)
    num_heavy = 0
    while num_heavy < len(units) and row_seconds + units[num_heavy].seconds > (
        _HEAVY * filled_seconds
    ):
        placing.stack(units[num_heavy])
        num_heavy += 1
    placing.spread(units[num_heavy:])
    return placing.blocks


class _Placing:
    """Which groups run what in which row so far."""

    def __init__(
        self,
        num_groups: int,
        group_size: int,
        row_seconds: float,
        filled_seconds: float,
        bubble: int,
        target: float,
    ) -> None:
        self.group_size = group_size
        self.row_seconds = row_seconds
        self.filled_seconds = filled_seconds
        self.bubble = bubble
        self.target = target
        self.blocks = Blocks(
            clock=np.zeros(num_groups),
            longest=np.zeros(num_groups),
            num_rows=np.zeros(num_groups, dtype=np.int64),
        )

    def stack(self, unit: _Unit) -> None:
        """A heavy row on groups that have one as heavy, unless they are late by it and others
        would not be."""
        blocks = self.blocks
        lasts = self.row_seconds + unit.seconds
        after = blocks.clock + lasts + self.bubble * np.maximum(blocks.longest, lasts)
        order = np.argsort(after, kind="stable")
        limit = max(self.target, float(after[order[unit.num_groups - 1]]))
        fits = np.flatnonzero((blocks.longest >= lasts) & (after <= limit))
        if len(fits) >= unit.num_groups:
            order = fits[np.lexsort((blocks.num_rows[fits], blocks.clock[fits]))]
        groups = order[: unit.num_groups]
        self._add(unit, groups, int(blocks.num_rows[groups].max()))

    def spread(self, units: Sequence[_Unit]) -> None:
        """Light rows, row by row, on groups that have time for one more."""
        blocks = self.blocks
        # Most are on few groups, for which lists are quicker than arrays.
        clock, num_rows = blocks.clock.tolist(), blocks.num_rows.tolist()
        longest = blocks.longest.tolist()
        left, row, target = list(units), min(num_rows), self.target
        most = self._most_rows(target, clock, num_rows, longest)
        while left:
            if row >= max(most):
                # Nobody has time: all get more.
                row, target = min(num_rows), _LATER * target
                most = self._most_rows(target, clock, num_rows, longest)
                continue
            # Rows that a group has already run, but for whole sequences, would come too early.
            free = [group for group, num in enumerate(most) if num_rows[group] <= row < num]
            ready = {
                group: clock[group] + (row - num_rows[group]) * self.filled_seconds
                for group in free
            }
            free.sort(key=ready.__getitem__)
            first = 0
            passed: list[_Unit] = []
            for place, unit in enumerate(left):
                begin, last = first, first + unit.num_groups - 1
                # Who would wait for long takes no part.
                while last < len(free) and ready[free[last]] - ready[free[begin]] > (
                    _PATIENCE * self.filled_seconds
                ):
                    begin, last = begin + 1, last + 1
                if last >= len(free):
                    passed.append(unit)
                    if first == len(free) or len(passed) > _NUM_LOOKS:
                        passed += left[place + 1 :]
                        break
                    continue
                chosen = sorted(free[begin : last + 1])
                first = last + 1
                lasts = self.row_seconds + unit.seconds
                end = lasts + max(ready[group] for group in chosen)
                for group in chosen:
                    clock[group], num_rows[group] = end, row + 1
                    longest[group] = max(longest[group], lasts)
                blocks.slots.append(self._slot(unit, chosen, row))
            left = passed
            row += 1
        blocks.clock, blocks.longest = np.array(clock), np.array(longest)
        blocks.num_rows = np.array(num_rows, dtype=np.int64)

    def _most_rows(
        self,
        target: float,
        clock: Sequence[float],
        num_rows: Sequence[int],
        longest: Sequence[float],
    ) -> list[int]:
        """Up to how many rows each group may have if all is to be through by then."""
        filled = self.filled_seconds
        return [
            num + max(0, int((target - self.bubble * max(slowest, filled) - busy) / filled))
            for num, busy, slowest in zip(num_rows, clock, longest, strict=True)
        ]

    def _add(self, unit: _Unit, groups: IntArray, row: int) -> None:
        blocks = self.blocks
        lasts = self.row_seconds + unit.seconds
        # Rows that a group has before this one are filled with whole sequences.
        ready = blocks.clock[groups] + (row - blocks.num_rows[groups]) * self.filled_seconds
        blocks.clock[groups] = float(ready.max()) + lasts
        blocks.longest[groups] = np.maximum(blocks.longest[groups], lasts)
        blocks.num_rows[groups] = row + 1
        blocks.slots.append(self._slot(unit, sorted(groups.tolist()), row))

    def _slot(self, unit: _Unit, chosen: list[int], row: int) -> Slot:
        size = self.group_size
        if size == 1:
            return Slot(row, chosen, [(unit.members[0][0], chosen)], unit.seconds)
        ranks = [group * size + place for group in chosen for place in range(size)]
        blocks, first = [], 0
        for sequence, num_ranks in unit.members:
            blocks.append((sequence, ranks[first : first + num_ranks]))
            first += num_ranks
        return Slot(row, chosen, blocks, unit.seconds)
