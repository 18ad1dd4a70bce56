"""Which sequences are shared, and over how many ranks each may be.

A sequence needs enough ranks for its tokens, D_min = s / C, and is through sooner with more; but
from some number on its exchange shows (`communication`) and rank-seconds are lost. How many of
them may be paid is the planner's choice, so a candidate keeps its seconds for every number of
ranks worth a thought.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from parallel.plan.cost import CostModel

# So many of the longest sequences may take any number of ranks.
_NUM_DECISIVE = 64
# Only sequences with this part of the step's work may pay more: others find room elsewhere.
_WEIGHTY = 0.02


@dataclass(slots=True)
class Candidate:
    """A sequence that is shared."""

    sequence: int
    work: float
    """Seconds of one rank alone."""
    fewest: int
    """Ranks that hold its tokens."""
    most: int
    """Ranks that a block takes of its own accord; more only where the target demands it."""
    widest: int
    """Ranks that it may take to leave none idle."""
    seconds: list[float]
    """Of a block of fewest, fewest + 1, ... ranks, g included, up to the quickest."""
    falling: list[float]
    """The least seconds of so many ranks or fewer: an all-to-all suits only some numbers."""

    def on(self, num_ranks: int) -> float:
        """Seconds of a block of so many ranks."""
        return self.seconds[num_ranks - self.fewest]

    @property
    def limit(self) -> int:
        """The most ranks that still make it faster."""
        return self.fewest + len(self.seconds) - 1

    def fewest_within(self, height: float) -> int:
        """The fewest ranks that need no more than `height` seconds; `limit` if none do."""
        if self.falling[0] <= height:
            return self.fewest
        # Ascending in the negative.
        place = bisect_left(self.falling, -height, key=lambda seconds: -seconds)
        return min(self.fewest + place, self.limit)


def make_candidates(
    sequences: Sequence[int],
    lengths: Sequence[int],
    fewest_ranks: Sequence[int],
    *,
    num_ranks: int,
    cost_model: CostModel,
    communication_share: float,
    against_idling: float,
    target: float,
    group_size: int = 1,
) -> list[Candidate]:
    """Candidates of these sequences, with their lengths and the ranks that hold them.

    communication_share: part of a sequence's work that its exchange may cost more than on its
    fewest ranks. against_idling: the same where ranks would be idle otherwise. target: seconds in
    which all should be through. group_size: groups of so many ranks are counted in place of ranks.
    """
    length = np.asarray(lengths, dtype=np.int64)
    fewest = -(-np.asarray(fewest_ranks, dtype=np.int64) // group_size)
    num_groups = num_ranks // group_size
    useful = 2 * cost_model.max_useful_ranks(length) // group_size
    useful = np.maximum(np.maximum(useful, 4 * fewest), 16)
    longest_ring = length // group_size
    most = np.maximum(fewest, np.minimum(np.minimum(useful, num_groups), longest_ring))
    # One that may decide the length of the step gets whatever helps.
    decides = cost_model.shared_seconds(length, most * group_size) > 0.5 * target
    decides &= length >= np.sort(length)[-min(len(length), _NUM_DECISIVE) :][:1]
    most = np.where(decides, np.maximum(np.minimum(num_groups, longest_ring), most), most)
    # All numbers of ranks of all sequences in one row of arrays.
    sizes = most - fewest + 1
    ends = np.cumsum(sizes)
    counts = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - sizes - fewest, sizes)
    seconds = cost_model.shared_seconds(np.repeat(length, sizes), counts * group_size)
    overhead = seconds * counts
    work = cost_model.lengths_seconds(lengths) / group_size
    found = []
    for index, (sequence, end, size) in enumerate(
        zip(sequences, ends.tolist(), sizes.tolist(), strict=True)
    ):
        own = seconds[end - size : end]
        best = int(own.argmin())
        paid = overhead[end - size : end - size + best + 1]
        least = int(fewest[index])
        last = least + _last(paid <= paid[0] + communication_share * work[index])
        widest = last
        if work[index] > _WEIGHTY * num_groups * target:
            widest = least + _last(paid <= paid[0] + against_idling * work[index])
        own = own[: best + 1] + cost_model.fixed_seconds
        found.append(
            Candidate(
                sequence,
                float(work[index]),
                least,
                last,
                widest,
                own.tolist(),
                np.minimum.accumulate(own).tolist(),
            )
        )
    return found


def _last(marks: npt.NDArray[np.bool_]) -> int:
    """The last place that is marked; the first always is."""
    return len(marks) - 1 - int(marks[::-1].argmax())
