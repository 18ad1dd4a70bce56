"""Rows of a pipeline: one index for each meeting, lengths chosen, bubbles and groups counted."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.plan.communication import RingCost
from parallel.plan.cost import CostModel
from parallel.plan.predict import predict
from parallel.plan.records import StepPlan
from parallel.plan.row_blocks import place_in_rows
from parallel.plan.row_fill import Cells, fill_cells, open_rows
from parallel.plan.row_shares import RowShape, Shares, bundle, share
from parallel.plan.row_slots import Blocks, RowTimes
from parallel.plan.rows import RowLimits, plan_rows

LINEAR = CostModel(0.0, 1.0, 0.0)


def _tokens(plan: StepPlan) -> list[list[int]]:
    return [[batch.num_tokens for batch in batches] for batches in plan.micro_batches]


def _rows_of(plan: StepPlan, sequence: int) -> set[int]:
    return {
        index
        for batches in plan.micro_batches
        for index, batch in enumerate(batches)
        for piece in batch.pieces
        if piece.sequence == sequence
    }


def test_short_rows_make_short_bubbles() -> None:
    limits = RowLimits(num_ranks=2, tokens_per_rank=10, num_pipeline_stages=2)
    assert _tokens(plan_rows([5] * 8, limits, LINEAR)) == [[5] * 4, [5] * 4]
    # Unless each costs something for itself: (4 + 1) (5 + 20) against (2 + 1) (10 + 20).
    costly = CostModel(0.0, 1.0, 20.0)
    assert _tokens(plan_rows([5] * 8, limits, costly)) == [[10, 10], [10, 10]]


def test_shared_sequences_stand_in_one_row() -> None:
    limits = RowLimits(num_ranks=4, tokens_per_rank=10, num_pipeline_stages=2)
    plan = plan_rows([40, 38, 9, 1], limits, LINEAR)
    assert [len(_rows_of(plan, sequence)) for sequence in range(4)] == [1, 1, 1, 1]
    assert _rows_of(plan, 0) != _rows_of(plan, 1)


def test_groups_of_experts_keep_together_in_a_pipeline() -> None:
    limits = RowLimits(
        num_ranks=8, tokens_per_rank=10, num_pipeline_stages=2, expert_parallel_size=4
    )
    plan = plan_rows([50, 9, 9], limits, LINEAR)
    holders = [any(p.sequence == 0 for b in rank for p in b.pieces) for rank in plan.micro_batches]
    assert sum(holders[:4]) in (0, 4)
    assert sum(holders[4:]) in (0, 4)
    for first in (0, 4):
        assert len({len(rank) for rank in plan.micro_batches[first : first + 4]}) == 1


def test_counts_are_multiples() -> None:
    limits = RowLimits(
        num_ranks=3, tokens_per_rank=10, num_pipeline_stages=2, num_micro_batches_multiple=2
    )
    plan = plan_rows([10, 10, 10, 10], limits, LINEAR)
    assert all(len(batches) % 2 == 0 and batches for batches in plan.micro_batches)
    nothing = plan_rows([], limits, LINEAR)
    assert _tokens(nothing) == [[0, 0]] * 3


def test_ranks_until_rows_are_short_enough() -> None:
    # a s^2 / D <= 41 - 20 for 100 tokens takes 5 ranks; 30 are whole; 20 tokens a row take 2.
    shape = RowShape(row_tokens=20, level_seconds=41.0, exchange_share=0.0)
    ring = RingCost(bytes_per_second=1e9, key_value_bytes=1.0, latency_seconds=1e-6)
    cost = CostModel(0.01, 1.0, 0.0, ring)
    found = share(np.array([100, 30, 20]), cost, shape, num_ranks=8, group_size=1)
    assert (found.sequences.tolist(), found.num_ranks.tolist()) == ([0, 1], [5, 2])
    # And whole groups of four.
    found = share(np.array([100, 30, 20]), cost, shape, num_ranks=8, group_size=4)
    assert (found.sequences.tolist(), found.num_ranks.tolist()) == ([0, 1], [8, 2])
    # Where the exchange costs nothing, as many as there are.
    found = share(np.array([100]), CostModel(0.01, 1.0, 0.0), shape, num_ranks=8, group_size=1)
    assert found.num_ranks.tolist() == [8]


def test_small_blocks_stand_beside_each_other() -> None:
    shares = Shares(np.array([7, 8, 9]), np.array([3, 2, 2]), np.array([5.0, 4.0, 3.0]))
    assert list(bundle(shares, 4)) == [(5.0, [(7, 3)]), (4.0, [(8, 2), (9, 2)])]


def test_heavy_rows_go_to_the_same_ranks() -> None:
    # Two blocks of two ranks and 10 seconds: side by side all four ranks have a long bubble. The
    # second waits for a second row only because the first is full of one of four.
    shares = Shares(np.array([0, 1, 2]), np.array([4, 2, 2]), np.array([10.0, 10.0, 9.0]))
    blocks = place_in_rows(
        shares,
        num_groups=4,
        group_size=1,
        times=RowTimes(row_seconds=1.0, filled_seconds=1.0, bubble=3),
        target=100.0,
    )
    assert blocks.slots[0][:2] == (0, [0, 1, 2, 3])
    assert {slot.row for slot in blocks.slots[1:]} == {1}
    assert blocks.longest.tolist() == [11.0] * 4
    assert sorted(blocks.clock.tolist()) == [21.0, 21.0, 22.0, 22.0]


def test_groups_that_are_never_ready_together_wait() -> None:
    # Two groups are 10 seconds late whichever row it is; the second sequence needs all four.
    shares = Shares(np.array([0, 1]), np.array([2, 4]), np.array([10.0, 0.1]))
    blocks = place_in_rows(
        shares,
        num_groups=4,
        group_size=1,
        times=RowTimes(row_seconds=1.0, filled_seconds=1.0, bubble=1),
        target=100.0,
    )
    heavy, light = blocks.slots
    assert heavy.groups == [0, 1]
    assert light.groups == [0, 1, 2, 3]
    assert blocks.clock.tolist() == pytest.approx([11.0 + light.row - 1 + 1.1] * 4)


@given(st.lists(st.integers(1, 7), max_size=60))
def test_bundles_are_first_fit(num_ranks: list[int]) -> None:
    seconds = np.linspace(2.0, 1.0, len(num_ranks))
    shares = Shares(np.arange(len(num_ranks)), np.array(num_ranks, dtype=np.int64), seconds)
    expected: list[list[tuple[int, int]]] = []
    for sequence, wanted in enumerate(num_ranks):
        for members in expected:
            if sum(ranks for _, ranks in members) + wanted <= 8:
                members.append((sequence, wanted))
                break
        else:
            expected.append([(sequence, wanted)])
    found = list(bundle(shares, 8))
    assert [members for _, members in found] == expected
    assert [slowest for slowest, _ in found] == [seconds[members[0][0]] for members in expected]


def test_rows_are_opened_where_the_step_would_end_first() -> None:
    blocks = Blocks(
        clock=np.array([9.0, 0.0]), longest=np.array([9.0, 0.0]), num_rows=np.array([1, 0])
    )
    end = open_rows(
        blocks,
        50,
        group_size=1,
        row_tokens=10,
        used_tokens=10,
        times=RowTimes(row_seconds=2.0, filled_seconds=2.0, bubble=1),
        multiple=1,
    )
    # 60 tokens in rows of 10: the first has one heavy row, so five are the other's.
    assert blocks.num_rows.tolist() == [1, 5]
    assert end == 18.0


def _cells(
    num_rows: list[int],
    *,
    capacity: int,
    multiple: int = 1,
    lengths: Sequence[int] = (8, 7, 3, 2),
) -> Cells:
    num = len(num_rows)
    blocks = Blocks(clock=np.zeros(num), longest=np.zeros(num), num_rows=np.array(num_rows))
    return Cells(
        blocks,
        lengths,
        group_size=1,
        capacity=capacity,
        times=RowTimes(row_seconds=1.0, filled_seconds=1.0, bubble=1),
        multiple=multiple,
    )


def test_a_row_more_where_none_has_room() -> None:
    cells = _cells([1, 1], capacity=10)
    fill_cells(cells, [0, 1, 2, 3], [0.8, 0.7, 0.3, 0.2], short_tokens=10)
    assert sorted(cells.num_rows) == [1, 1]
    cells = _cells([1, 0], capacity=10)
    fill_cells(cells, [0, 1, 2, 3], [0.8, 0.7, 0.3, 0.2], short_tokens=10)
    assert sum(cells.num_rows) == 2
    placed = sorted(i for group in cells.whole for row in group for cell in row for i in cell)
    assert placed == [0, 1, 2, 3]


def test_a_multiple_of_rows_is_opened_and_used() -> None:
    # Two cells of ten are full; of the four rows that come with the next sequence all are filled.
    cells = _cells([0, 0], capacity=10, multiple=4)
    fill_cells(cells, [0, 1, 2, 3], [0.0] * 4, short_tokens=1000)
    assert cells.num_rows == [4, 0]
    assert [sum(map(len, row)) for row in cells.whole[0]] == [1, 1, 1, 1]
    assert cells.end == [4.0, 0.0]


def test_more_rows_go_to_the_group_that_ends_first() -> None:
    # Each takes a row for itself; 8 seconds of attention keep the first group busy meanwhile.
    cells = _cells([0, 0], capacity=8, lengths=[8] * 6)
    fill_cells(cells, list(range(6)), [8.0, *[1.0] * 5], short_tokens=1000)
    assert cells.whole[0] == [[[0]]]
    assert sorted(i for row in cells.whole[1] for i in row[0]) == [1, 2, 3, 4, 5]


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=40),
    st.integers(1, 5),
    st.integers(2, 4),
    st.sampled_from((0.0, 0.02)),
)
def test_all_sequences_of_one_length_fill_their_rows(
    lengths: list[int], num_ranks: int, stages: int, quadratic: float
) -> None:
    limits = RowLimits(num_ranks=num_ranks, tokens_per_rank=60, num_pipeline_stages=stages)
    cost = CostModel(quadratic, 1.0, 0.5)
    plan = plan_rows(lengths, limits, cost)
    plan.check()
    assert predict(plan, cost, num_pipeline_stages=stages).efficiency <= 1 + 1e-9


def test_a_pipeline_of_equal_sequences_is_at_its_bound() -> None:
    limits = RowLimits(num_ranks=4, tokens_per_rank=100, num_pipeline_stages=4)
    cost = CostModel(1e-3, 1.0, 0.1)
    plan = plan_rows([10] * 160, limits, cost)
    assert predict(plan, cost, num_pipeline_stages=4).efficiency == pytest.approx(1.0, abs=0.02)
