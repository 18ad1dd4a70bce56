"""Rows: one index for each meeting, groups of experts in step, padding and bubbles counted."""

from parallel.plan.cost import CostModel
from parallel.plan.predict import predict
from parallel.plan.records import StepPlan
from parallel.plan.row_fill import Cell, RowCost, fill_rows
from parallel.plan.rows import RowLimits, plan_rows

LINEAR = CostModel(0.0, 1.0, 0.0)


def _tokens(plan: StepPlan) -> list[list[int]]:
    return [[batch.num_tokens for batch in batches] for batches in plan.micro_batches]


def test_rows_of_a_pipeline_are_filled_before_new_ones_open() -> None:
    limits = RowLimits(num_ranks=2, tokens_per_rank=10, num_pipeline_stages=2)
    plan = plan_rows([5] * 8, limits, LINEAR)
    assert _tokens(plan) == [[10, 10], [10, 10]]


def test_shared_sequences_stand_in_one_row() -> None:
    limits = RowLimits(num_ranks=4, tokens_per_rank=10, num_pipeline_stages=2)
    plan = plan_rows([40, 38, 9, 1], limits, LINEAR)
    rows = {
        sequence: {
            index
            for batches in plan.micro_batches
            for index, batch in enumerate(batches)
            for piece in batch.pieces
            if piece.sequence == sequence
        }
        for sequence in range(4)
    }
    assert rows[0] == {0}
    assert rows[1] == {1}


def test_experts_share_rows_of_equal_length() -> None:
    # Two groups of two: within a group each row's cells are alike.
    limits = RowLimits(num_ranks=4, tokens_per_rank=10, expert_parallel_size=2)
    plan = plan_rows([9, 9, 9, 9, 4, 4, 4, 4], limits, LINEAR)
    tokens = _tokens(plan)
    assert tokens[0] == tokens[1]
    assert tokens[2] == tokens[3]
    assert predict(plan, LINEAR, expert_parallel_size=2).efficiency == 1.0


def test_a_shared_sequence_takes_whole_groups_of_experts() -> None:
    limits = RowLimits(num_ranks=8, tokens_per_rank=10, expert_parallel_size=4)
    plan = plan_rows([50, 9, 9], limits, LINEAR)
    holders = [any(p.sequence == 0 for b in rank for p in b.pieces) for rank in plan.micro_batches]
    assert sum(holders[:4]) in (0, 4)
    assert sum(holders[4:]) in (0, 4)
    assert len({len(rank) for rank in plan.micro_batches[:4]}) == 1


def test_counts_are_multiples() -> None:
    limits = RowLimits(
        num_ranks=3, tokens_per_rank=10, num_pipeline_stages=2, num_micro_batches_multiple=2
    )
    plan = plan_rows([10, 10, 10, 10], limits, LINEAR)
    assert all(len(batches) % 2 == 0 and batches for batches in plan.micro_batches)


def test_costs_of_rows() -> None:
    cost = CostModel(2.0, 3.0, 5.0)
    padded = RowCost.of(cost, capacity=10, is_padded=True)
    assert padded.per_row == 5 + 30
    assert padded.sequence_seconds(4) == 32.0
    loose = RowCost.of(cost, capacity=10, is_padded=False)
    assert loose.per_row == 5.0
    assert loose.sequence_seconds(4) == 44.0


def test_the_roomiest_group_is_found_behind_many_full_ones() -> None:
    # Ten idle ranks have no room; the busiest has.
    columns = [[Cell(0)] for _ in range(10)] + [[Cell(5, seconds=100.0)]]
    cost = RowCost(per_row=1.0, per_token=1.0, per_square=0.0)
    fill_rows(columns, [0], [5], capacity=10, group_size=1, cost=cost, max_rows=1, bubble=0)
    assert columns[10][0].whole == [0]
    # And where nobody has room, the least busy opens a row.
    fill_rows(columns, [0], [5], capacity=10, group_size=1, cost=cost, max_rows=1, bubble=0)
    assert [len(column) for column in columns] == [2] + [1] * 10
