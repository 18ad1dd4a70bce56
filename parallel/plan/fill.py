"""Whole sequences into what the blocks leave: gaps before them and the ends of the ranks.

Costliest first, each to the place with the most time left (longest processing time first): the end
of a rank has the time up to the target, a gap the time until its block starts. A gap must not be
overfilled, an end may be. Then single sequences are moved and swapped between the busiest ranks and
the idlest while that helps.
"""

import heapq
from collections.abc import Sequence

from parallel.plan.blocks import Schedule


class Fill:
    """Which whole sequences run in each gap and at the end of each rank."""

    def __init__(self, schedule: Schedule) -> None:
        self.in_gaps: list[list[int]] = [[] for _ in schedule.gaps]
        self.at_end: list[list[int]] = [[] for _ in schedule.busy]
        self.busy = list(schedule.busy)


def fill(
    schedule: Schedule, sequences: Sequence[int], seconds: Sequence[float], *, target: float
) -> Fill:
    """Place `sequences`, which come costliest first; `seconds` is indexed by sequence."""
    filled = Fill(schedule)
    ends = [(busy, rank) for rank, busy in enumerate(filled.busy)]
    heapq.heapify(ends)
    gaps = [(-gap.seconds, number) for number, gap in enumerate(schedule.gaps)]
    heapq.heapify(gaps)
    for sequence in sequences:
        wanted = seconds[sequence]
        busy, rank = ends[0]
        if gaps and -gaps[0][0] >= wanted and -gaps[0][0] > target - busy:
            room, number = gaps[0]
            heapq.heapreplace(gaps, (room + wanted, number))
            filled.in_gaps[number].append(sequence)
        else:
            heapq.heapreplace(ends, (busy + wanted, rank))
            filled.at_end[rank].append(sequence)
            filled.busy[rank] = busy + wanted
    _even_out(filled, seconds, target)
    return filled


def _even_out(filled: Fill, seconds: Sequence[float], target: float, num_rounds: int = 8) -> None:
    """Move or swap sequences between ends: the busiest rank's with the idlest's, and so on."""
    busy, at_end = filled.busy, filled.at_end
    for _ in range(num_rounds):
        mean = max(target, sum(busy) / len(busy))
        order = sorted(range(len(busy)), key=busy.__getitem__)
        tolerance = 2e-4 * mean
        improved = False
        for idlest, busiest in zip(order, reversed(order), strict=True):
            high, low = busy[busiest], busy[idlest]
            if high <= mean + tolerance or low >= high - tolerance:
                break
            moved = _best_exchange(at_end[busiest], at_end[idlest], seconds, (high - low) / 2)
            if moved is None:
                continue
            give, take, gain = moved
            at_end[busiest].remove(give)
            at_end[idlest].append(give)
            if take >= 0:
                at_end[idlest].remove(take)
                at_end[busiest].append(take)
            busy[busiest] -= gain
            busy[idlest] += gain
            improved = True
        if not improved:
            return


def _best_exchange(
    ours: Sequence[int], theirs: Sequence[int], seconds: Sequence[float], wanted: float
) -> tuple[int, int, float] | None:
    """What to give and take (-1: nothing) so that nearly `wanted` seconds change sides."""
    best: tuple[int, int, float] | None = None
    # A change of less than 2 wanted helps; the nearer to wanted the better.
    best_miss = wanted * (1 - 1e-3)
    offers = [(0.0, -1), *((seconds[i], i) for i in theirs)]
    for give in ours:
        surplus = seconds[give] - wanted
        if surplus <= -best_miss:
            continue
        for cost, take in offers:
            miss = abs(surplus - cost)
            if miss < best_miss:
                best, best_miss = (give, take, seconds[give] - cost), miss
    return best
