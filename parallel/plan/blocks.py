"""Where and when shared sequences run, if ranks only wait at meetings: blocks on plateaus.

Ranks that are equally busy form a *plateau*. A shared sequence is a block of D ranks and T / D
seconds. Put on D ranks of one plateau it makes nobody wait; on several it starts at the highest,
and the ranks of the lower ones have a *gap* before it, which whole sequences may fill later.
Longest first, each goes to the plateau where

    waiting + communication + overshoot of the target

is least. The number of ranks is free between what memory needs and what communication allows: all
of a plateau, an even part of it, or as many as let k such blocks on top of each other end at the
target. Which of these is best shows only later, so a *style* of choosing is an argument, and the
planner tries several.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from parallel.plan.candidates import Candidate


class Block(NamedTuple):
    """A shared sequence in its place."""

    sequence: int
    ranks: list[int]
    start: float
    seconds: float


class Gap(NamedTuple):
    """A rank that waits for a block."""

    rank: int
    block: int
    """Number of the block in its schedule."""
    seconds: float


@dataclass(slots=True)
class Schedule:
    """Blocks in an order that every rank can follow."""

    busy: list[float]
    """Seconds until each rank is through with its blocks."""
    blocks: list[Block] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)


Style = Callable[[Sequence[int], int], int]
"""Chooses one of several numbers of ranks, which come in ascending order; the second argument is
the largest that divides the plateau evenly."""


@dataclass(slots=True)
class _Plateau:
    level: float
    ranks: list[int]


_level = attrgetter("level")


def place_blocks(
    candidates: Sequence[Candidate],
    *,
    num_ranks: int,
    target: float,
    waiting_weight: float,
    style: Style,
) -> Schedule:
    """Place the candidates in the order given.

    target: when all should have ended, seconds. waiting_weight: what a second of waiting costs, 1
    if nothing can fill the gaps.
    """
    schedule = Schedule(busy=[0.0] * num_ranks)
    plateaus = [_Plateau(0.0, list(range(num_ranks)))]
    for entry in candidates:
        place, count = _choose(entry, plateaus, num_ranks, target, waiting_weight, style)
        _take(entry, plateaus, schedule, place, count)
    for plateau in plateaus:
        for rank in plateau.ranks:
            schedule.busy[rank] = plateau.level
    return schedule


def _choose(
    entry: Candidate,
    plateaus: list[_Plateau],
    num_ranks: int,
    target: float,
    waiting_weight: float,
    style: Style,
) -> tuple[int, int]:
    """The place of the highest plateau that takes part, and the number of ranks."""
    best_score, best = float("inf"), (0, 0)
    available = 0
    for place, plateau in enumerate(plateaus):
        size = len(plateau.ranks)
        available += size
        if available < entry.fewest:
            continue
        height = target - plateau.level
        fewest = entry.fewest_within(height)
        if size > fewest:
            count = _part(entry, size, fewest, height, style)
            waiting = 0.0
        else:
            count = min(fewest, available)
            waiting = _waiting(plateaus, place, count) * waiting_weight
        seconds = entry.on(count)
        score = waiting + seconds * count - entry.work
        if seconds > height:
            score += (seconds - height) * num_ranks
        if score < best_score - 1e-9 * entry.work:
            best_score, best = score, (place, count)
        if waiting == 0.0 and seconds <= height and size >= count:
            # All higher ones could only be worse.
            break
    return best


def _part(entry: Candidate, size: int, fewest: int, height: float, style: Style) -> int:
    """How many ranks of a plateau that has more than are needed."""
    most = max(entry.most, fewest)
    options = {fewest}
    # All of it; also if that costs some exchange, where the rest would hold no other block.
    if size <= most or (size < 2 * entry.fewest and size <= entry.widest):
        options.add(size)
    for parts in range(-(-size // most), size // fewest + 1):
        options.add(min(most, -(-size // parts)))
        if len(options) > 4:
            break
    even = max(options)
    for stacked in (2, 3):
        count = -int(-stacked * entry.work // height) if height > 0 else 0
        if fewest <= count <= min(most, size):
            options.add(count)
    return style(sorted(options), even)


def _waiting(plateaus: list[_Plateau], place: int, count: int) -> float:
    level = plateaus[place].level
    missing = count - len(plateaus[place].ranks)
    waiting = 0.0
    while missing > 0:
        place -= 1
        taken = min(missing, len(plateaus[place].ranks))
        waiting += taken * (level - plateaus[place].level)
        missing -= taken
    return waiting


def _take(
    entry: Candidate, plateaus: list[_Plateau], schedule: Schedule, place: int, count: int
) -> None:
    level = plateaus[place].level
    number = len(schedule.blocks)
    ranks: list[int] = []
    while len(ranks) < count:
        plateau = plateaus[place]
        taken = plateau.ranks[: count - len(ranks)]
        if len(taken) == len(plateau.ranks):
            del plateaus[place]
        else:
            del plateau.ranks[: len(taken)]
        ranks += taken
        if plateau.level < level:
            wait = level - plateau.level
            schedule.gaps += [Gap(rank, number, wait) for rank in taken]
        place -= 1
    ranks.sort()
    seconds = entry.on(count)
    schedule.blocks.append(Block(entry.sequence, ranks, level, seconds))
    end = level + seconds
    above = bisect_left(plateaus, end * (1 - 1e-9), key=_level)
    if above < len(plateaus) and plateaus[above].level <= end * (1 + 1e-9):
        plateaus[above].ranks = sorted(plateaus[above].ranks + ranks)
    else:
        insort(plateaus, _Plateau(end, list(ranks)), key=_level)
