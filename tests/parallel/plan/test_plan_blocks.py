"""Blocks on plateaus, whole sequences in what they leave, and ends made level."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.plan.blocks import Block, Gap, Schedule, place_blocks
from parallel.plan.candidates import Candidate, make_candidates
from parallel.plan.communication import RingCost
from parallel.plan.cost import CostModel
from parallel.plan.fill import Fill, fill
from parallel.plan.uneven import level_ends

LINEAR = CostModel(0.0, 1.0, 0.0)
# Heads suit 2 and 4 ranks; a ring costs 2 seconds a hop with 10 tokens.
HEADS = CostModel(
    0.0,
    1.0,
    0.0,
    RingCost(bytes_per_second=20.0, key_value_bytes=1.0, query_bytes=0.0, num_query_groups=4),
)


def _even(_: Sequence[int], even: int) -> int:
    return even


def _fewest(options: Sequence[int], _: int) -> int:
    return options[0]


def _candidates(
    lengths: Sequence[int], fewest: Sequence[int], num_ranks: int, cost: CostModel = LINEAR
) -> list[Candidate]:
    return make_candidates(
        range(len(lengths)),
        lengths,
        fewest,
        num_ranks=num_ranks,
        cost_model=cost,
        communication_share=0.0,
        against_idling=0.0,
        target=1e9,
    )


def test_candidates_by_hand() -> None:
    free, costly = _candidates([40, 40], [3, 3], 8), _candidates([40], [3], 8, HEADS)
    assert [free[0].fewest, free[0].most, free[0].limit] == [3, 8, 8]
    assert free[0].on(5) == 8.0
    assert free[1].fewest_within(6.0) == 7
    assert free[1].fewest_within(0.1) == 8
    # On 3 ranks a ring, on 4 heads: cheaper in all although there is one rank more.
    (found,) = costly
    assert found.on(3) > found.on(4) == pytest.approx(10 + 4 * 10 * 0.75 / 20 / 2 * 1)
    assert found.most == 4
    # Five ranks need a ring again, so whoever asks for ranks by time gets four.
    assert found.fewest_within(found.on(4)) == 4


def test_side_by_side_then_on_top() -> None:
    schedule = place_blocks(
        _candidates([60, 20, 12], [3, 1, 2], 4),
        num_ranks=4,
        target=23.0,
        waiting_weight=1.0,
        style=_fewest,
    )
    assert schedule.blocks == [
        Block(0, [0, 1, 2], 0.0, 20.0),
        Block(1, [3], 0.0, 20.0),
        # Height 3 is left: four ranks of the common plateau.
        Block(2, [0, 1, 2, 3], 20.0, 3.0),
    ]
    assert schedule.gaps == []
    assert schedule.busy == [23.0] * 4


def test_an_even_part_of_a_plateau() -> None:
    (block,) = place_blocks(
        _candidates([60], [3], 6)[:1],
        num_ranks=12,
        target=1e9,
        waiting_weight=1.0,
        style=_even,
    ).blocks
    # At most 6 of 12 ranks: half of them.
    assert len(block.ranks) == 6


def test_a_block_on_two_plateaus_leaves_gaps() -> None:
    schedule = place_blocks(
        _candidates([30, 16], [3, 4], 3)[:1] + _candidates([30, 16], [3, 4], 4)[1:],
        num_ranks=4,
        target=14.0,
        waiting_weight=1.0,
        style=_even,
    )
    assert schedule.blocks[1] == Block(1, [0, 1, 2, 3], 10.0, 4.0)
    assert schedule.gaps == [Gap(3, 1, 10.0)]


def test_gaps_are_filled_and_not_overfilled() -> None:
    schedule = Schedule(busy=[14.0, 14.0], gaps=[Gap(1, 0, 10.0)])
    seconds = [11.0, 6.0, 5.0, 4.0]
    filled = fill(schedule, [0, 1, 2, 3], seconds, target=25.0)
    # 11 is too long for the gap. Then 11 seconds are left at one end, 10 in the gap.
    assert filled.in_gaps == [[2]]
    assert filled.at_end == [[0], [1, 3]]
    assert filled.busy == [25.0, 24.0]


@given(
    seconds=st.lists(st.floats(0.1, 10.0), min_size=1, max_size=40),
    num_ranks=st.integers(1, 6),
)
def test_ends_are_what_was_placed_there(seconds: list[float], num_ranks: int) -> None:
    order = sorted(range(len(seconds)), key=lambda i: -seconds[i])
    filled = fill(Schedule(busy=[1.0] * num_ranks), order, seconds, target=0.0)
    placed = [sum((seconds[i] for i in rank), 1.0) for rank in filled.at_end]
    assert filled.busy == pytest.approx(placed)
    assert sorted(i for rank in filled.at_end for i in rank) == list(range(len(seconds)))
    # Longest processing time first is within 4/3 of the best (Graham); exchanges only help.
    best = max(sum(seconds) / num_ranks, seconds[order[0]])
    if len(seconds) > num_ranks:
        best = max(best, seconds[order[num_ranks - 1]] + seconds[order[num_ranks]])
    assert max(filled.busy) - 1.0 <= 4 / 3 * best + 1e-9


def _ends(lengths: list[int], at_end: list[list[int]], share: float) -> tuple[Schedule, Fill]:
    """One block of sequence 0 on all ranks, and whole sequences behind it."""
    ranks = list(range(len(at_end)))
    schedule = Schedule(busy=[share] * len(at_end), blocks=[Block(0, ranks, 0.0, share)])
    filled = Fill(schedule)
    filled.at_end = [list(rank) for rank in at_end]
    filled.busy = [share + sum(lengths[i] for i in rank) for rank in at_end]
    return schedule, filled


def test_borders_move_until_all_end_together() -> None:
    lengths = [90, 20, 4]
    schedule, filled = _ends(lengths, [[1], [2], []], 30.0)
    cuts = level_ends(schedule, filled, lengths, capacity=40, cost_model=LINEAR, enough=38.0)
    assert cuts[0].shares == [18, 34, 38]
    assert cuts[0].whole == [[1], [2], []]
    assert filled.busy == [38.0] * 3
    assert filled.at_end == [[], [], []]


@pytest.mark.parametrize(
    ("at_end", "capacity", "enough"),
    [
        # No room beside the pieces; even enough; more behind the block than the level.
        ([[1], [2], []], 37, 38.0),
        ([[1], [2], []], 40, 50.0),
        ([[1, 2, 3], [], []], 1000, 38.0),
    ],
)
def test_borders_stay_where_moving_them_is_no_use(
    at_end: list[list[int]], capacity: int, enough: float
) -> None:
    lengths = [90, 20, 4, 300]
    schedule, filled = _ends(lengths, at_end, 30.0)
    before = list(filled.busy)
    assert not level_ends(
        schedule, filled, lengths, capacity=capacity, cost_model=LINEAR, enough=enough
    )
    assert filled.busy == before
    assert filled.at_end == at_end
