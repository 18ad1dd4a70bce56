"""Where shared sequences stand in the rows of a pipeline: records of `row_blocks` and its like.

Row k is what the ranks run as their k-th micro-batch. A *group* is one rank, or the ranks of one
group of experts, which run each row together.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from parallel.plan.row_shares import FloatArray, IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTimes:
    """What rows take if all have the length that a try gives them."""

    row_seconds: float
    """c: a row without attention."""
    filled_seconds: float
    """A row of whole sequences, above 0."""
    bubble: int
    """p - 1: how often a group's longest row is paid once more."""


class Unit(NamedTuple):
    """What becomes a slot: a block of whole groups, or small blocks beside each other in one."""

    num_groups: int
    seconds: float
    """Of the slowest block, beyond c."""
    members: list[tuple[int, int]]
    """(sequence, number of ranks), the slowest first."""


class Slot(NamedTuple):
    """A unit in its place."""

    row: int
    groups: list[int]
    """Ascending."""
    blocks: list[tuple[int, list[int]]]
    """(sequence, its ranks)."""
    seconds: float
    """What the longest of them takes beyond c."""

    @classmethod
    def of(cls, unit: Unit, groups: list[int], row: int, *, group_size: int) -> "Slot":
        """Give the members of a unit the ranks of these groups, one after the other."""
        ranks = groups
        if group_size > 1:
            ranks = [group * group_size + place for group in groups for place in range(group_size)]
        blocks, first = [], 0
        for sequence, num_ranks in unit.members:
            blocks.append((sequence, ranks[first : first + num_ranks]))
            first += num_ranks
        return cls(row, groups, blocks, unit.seconds)


@dataclass(slots=True)
class Blocks:
    """All slots, and what they leave of each group."""

    clock: FloatArray
    """[num_groups]: seconds until a group is through with the rows that have slots."""
    longest: FloatArray
    """[num_groups]: seconds of its longest row."""
    num_rows: IntArray
    """[num_groups]: rows that it must have to meet the others."""
    slots: list[Slot] = field(default_factory=list)

    @classmethod
    def none(cls, num_groups: int) -> "Blocks":
        """Groups without a row."""
        return cls(
            clock=np.zeros(num_groups),
            longest=np.zeros(num_groups),
            num_rows=np.zeros(num_groups, dtype=np.int64),
        )
