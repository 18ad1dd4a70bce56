"""Shared sequences in rows: the ranks and the row of each.

Heavy rows are stacked: the slowest first, each goes to groups that have one as slow already, if
they can still be through in time, so that the other groups keep short bubbles. Light ones are
spread over the groups that have time (`row_spread`).
"""

import numpy as np

from parallel.plan.row_shares import Shares, bundle
from parallel.plan.row_slots import Blocks, RowTimes, Slot, Unit
from parallel.plan.row_spread import spread

# Over a row of whole sequences: rows that last so long are stacked on few groups.
_HEAVY = 1.25


def place_in_rows(
    shares: Shares, *, num_groups: int, group_size: int, times: RowTimes, target: float
) -> Blocks:
    """Give each shared sequence its row and its ranks; target: seconds after which it is late."""
    blocks = Blocks.none(num_groups)
    units = _units(shares, group_size)
    num_heavy = 0
    while num_heavy < len(units) and times.row_seconds + units[num_heavy].seconds > (
        _HEAVY * times.filled_seconds
    ):
        _stack(blocks, units[num_heavy], group_size=group_size, times=times, target=target)
        num_heavy += 1
    spread(blocks, units[num_heavy:], group_size=group_size, times=times, target=target)
    return blocks


def _units(shares: Shares, group_size: int) -> list[Unit]:
    """Blocks of whole groups and bundles of smaller ones, the slowest first."""
    is_small = shares.num_ranks < group_size
    large, small = shares.only(~is_small), shares.only(is_small)
    units = [
        Unit(num_ranks // group_size, seconds, [(sequence, num_ranks)])
        for sequence, num_ranks, seconds in zip(*(part.tolist() for part in large), strict=True)
    ]
    units += [Unit(1, *one) for one in bundle(small, group_size)]
    return sorted(units, key=lambda unit: -unit.seconds)


def _stack(blocks: Blocks, unit: Unit, *, group_size: int, times: RowTimes, target: float) -> None:
    """A heavy row on groups that have one as heavy, unless they are late by it and others would
    not be."""
    lasts = times.row_seconds + unit.seconds
    after = blocks.clock + lasts + times.bubble * np.maximum(blocks.longest, lasts)
    order = np.argsort(after, kind="stable")
    limit = max(target, float(after[order[unit.num_groups - 1]]))
    fits = np.flatnonzero((blocks.longest >= lasts) & (after <= limit))
    if len(fits) >= unit.num_groups:
        order = fits[np.lexsort((blocks.num_rows[fits], blocks.clock[fits]))]
    groups = order[: unit.num_groups]
    row = int(blocks.num_rows[groups].max())
    # Rows that a group has before this one are filled with whole sequences.
    ready = blocks.clock[groups] + (row - blocks.num_rows[groups]) * times.filled_seconds
    blocks.clock[groups] = float(ready.max()) + lasts
    blocks.longest[groups] = np.maximum(blocks.longest[groups], lasts)
    blocks.num_rows[groups] = row + 1
    blocks.slots.append(Slot.of(unit, sorted(groups.tolist()), row, group_size=group_size))
