"""Which sequences are shared in rows of one length, and over how many ranks.

All rows of a pipeline have L tokens and cost c = b L + g at least. A sequence of s tokens makes
them longer on its D ranks, to

    U(D) = c + a s^2 / D + exchange

The longest row of a rank is paid p times (once, and p - 1 times in the bubble), so each sequence
gets ranks until U is below one level for all, and more as long as their exchange costs little.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from parallel.plan.cost import CostModel

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

# Ranks of a sequence grow by a quarter each time.
_NUM_ROUNDS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class RowShape:
    """What a try fixes before anything is placed."""

    row_tokens: int
    """L."""
    level_seconds: float
    """The longest that a row should last."""
    exchange_share: float
    """Of a sequence's attention, what its exchange may cost for the sake of a shorter row."""


class Shares(NamedTuple):
    """Shared sequences and their ranks, longest rows first; one entry each."""

    sequences: IntArray
    num_ranks: IntArray
    seconds: FloatArray
    """What a row of theirs lasts beyond c."""

    def only(self, marks: BoolArray) -> "Shares":
        """Those that are marked."""
        return Shares(self.sequences[marks], self.num_ranks[marks], self.seconds[marks])


def share(
    lengths: IntArray,
    cost_model: CostModel,
    shape: RowShape,
    *,
    num_ranks: int,
    group_size: int,
) -> Shares:
    """Ranks for every sequence that needs more than one; `lengths` come longest first."""
    per_row = cost_model.fixed_seconds + cost_model.linear_seconds * shape.row_tokens
    spare = max(shape.level_seconds - per_row, 1e-12)
    quadratic = cost_model.quadratic_seconds
    # A whole sequence may be too slow although a row holds it.
    longest_whole = min(shape.row_tokens, int((spare / quadratic) ** 0.5) if quadratic else 1 << 60)
    num_shared = int(np.searchsorted(-lengths, -longest_whole))
    length = lengths[:num_shared]
    attention = quadratic * length.astype(np.float64) ** 2
    fewest = -(-length // shape.row_tokens)
    most = np.maximum(np.minimum(num_ranks, length), fewest)
    ranks = np.maximum(fewest, 1)
    paid = shape.exchange_share * attention
    # Ranks are added as long as it is too slow or costs hardly anything.
    for _ in range(_NUM_ROUNDS):
        exposed = cost_model.exposed_seconds(length, ranks)
        is_slow = attention / ranks + exposed > spare
        more = np.minimum(np.maximum(ranks + 1, ranks * 5 // 4), most)
        exposed_more = cost_model.exposed_seconds(length, more)
        is_quicker = attention / more + exposed_more < attention / ranks + exposed
        is_cheap = exposed_more * more <= np.maximum(paid, exposed * ranks)
        grows = is_quicker & (is_slow | is_cheap)
        if not grows.any():
            break
        ranks = np.where(grows, more, ranks)
    if group_size > 1:
        in_groups = np.minimum(-(-ranks // group_size) * group_size, num_ranks)
        ranks = np.where(ranks > group_size, in_groups, ranks)
    seconds = attention / ranks + cost_model.exposed_seconds(length, ranks)
    # The clock may not run slower than the tokens where a sequence is on too few ranks.
    order = np.lexsort((-ranks, -seconds))
    order = order[ranks[order] > 1]
    return Shares(order, ranks[order], seconds[order])


def bundle(shares: Shares, group_size: int) -> Iterator[tuple[float, list[tuple[int, int]]]]:
    """Blocks of less than a group beside each other: seconds of the slowest, and (sequence, number
    of ranks) of all. First fit, the slowest first."""
    found: list[tuple[float, list[tuple[int, int]]]] = []
    # Places in `found` by the ranks that are free there; the first is the least of a heap.
    by_free: list[list[int]] = [[] for _ in range(group_size + 1)]
    for sequence, num_ranks, seconds in zip(*(part.tolist() for part in shares), strict=True):
        first = [(by_free[free][0], free) for free in range(num_ranks, group_size) if by_free[free]]
        if first:
            place, free = min(first)
            heapq.heappop(by_free[free])
        else:
            place, free = len(found), group_size
            found.append((seconds, []))
        found[place][1].append((sequence, num_ranks))
        heapq.heappush(by_free[free - num_ranks], place)
    yield from found
