"""Uneven cuts: the borders of a shared sequence move until its ranks end together.

Where a batch has few short sequences, the ends of ranks differ by whole sequences. If a block is
the last of its D ranks, what rank r runs behind it, e_r seconds of whole sequences, can move into
the block's micro-batch if C allows. The block's sequence, W seconds of work in s tokens, is cut so
that all end at one level:

    level = (W + sum_r e_r) / D        share_r = s (level - e_r) / W

which is fair because a head-to-tail cut's work is its tokens (`cuts`). The exchange pays for the
largest share.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from parallel.plan.blocks import Block, Schedule
from parallel.plan.cost import CostModel
from parallel.plan.fill import Fill


@dataclass(frozen=True, slots=True)
class UnevenCut:
    """How a block is cut, and what its ranks run with it in one micro-batch."""

    shares: list[int]
    """Tokens of each rank of the block."""
    whole: list[list[int]]
    """Whole sequences of each rank of the block."""


def level_ends(
    schedule: Schedule,
    filled: Fill,
    lengths: Sequence[int],
    *,
    capacity: int,
    cost_model: CostModel,
    enough: float,
) -> dict[int, UnevenCut]:
    """Cut last blocks unevenly where a rank ends after `enough` seconds; by number of the block.

    What moves into a block's micro-batch is taken from the ends of `filled`, and its times follow.
    """
    last_block: dict[int, int] = {}
    for number, block in enumerate(schedule.blocks):
        last_block.update(dict.fromkeys(block.ranks, number))
    cuts = {}
    for number, block in enumerate(schedule.blocks):
        ranks = block.ranks
        if len(ranks) == 1 or any(last_block[rank] != number for rank in ranks):
            continue
        if max(filled.busy[rank] for rank in ranks) <= enough:
            continue
        found = _level(block, filled, lengths, capacity=capacity, cost_model=cost_model)
        if found is None:
            continue
        shares, end = found
        cuts[number] = UnevenCut(shares, [filled.at_end[rank] for rank in ranks])
        for rank in ranks:
            filled.at_end[rank] = []
            filled.busy[rank] = end
    return cuts


def _level(
    block: Block, filled: Fill, lengths: Sequence[int], *, capacity: int, cost_model: CostModel
) -> tuple[list[int], float] | None:
    """Shares of the block's ranks, and when they all end; None if that helps nobody."""
    length = lengths[block.sequence]
    work = cost_model.sequence_seconds(length)
    beside = [
        sum(cost_model.sequence_seconds(lengths[i]) for i in filled.at_end[rank])
        for rank in block.ranks
    ]
    level = (work + sum(beside)) / len(block.ranks)
    if work <= 0.0 or max(beside) >= level:
        return None
    shares = _rounded([length * (level - seconds) / work for seconds in beside])
    used = [sum(lengths[i] for i in filled.at_end[rank]) for rank in block.ranks]
    if min(shares) < 1 or any(a + b > capacity for a, b in zip(shares, used, strict=True)):
        return None
    per_token = work / length
    slowest = max(a + b * per_token for a, b in zip(beside, shares, strict=True))
    exchange = cost_model.uneven_seconds(length, shares)
    end = block.start + slowest + exchange + cost_model.fixed_seconds
    if end >= max(filled.busy[rank] for rank in block.ranks):
        return None
    return shares, end


def _rounded(shares: Sequence[float]) -> list[int]:
    """Whole numbers with the same sum, none off by one or more."""
    rounded = [int(share) for share in shares]
    missing = round(sum(shares)) - sum(rounded)
    by_remainder = sorted(range(len(shares)), key=lambda i: rounded[i] - shares[i])
    for place in by_remainder[:missing]:
        rounded[place] += 1
    return rounded
