"""Static context parallelism: one size for all, everything cut over it, equal counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import PlanError
from parallel.plan.communication import RingCost
from parallel.plan.cost import CostModel
from parallel.plan.meetings import check_order
from parallel.plan.records import Piece
from parallel.plan.rings import row_layouts
from parallel.plan.static_cp import (
    plan_static_cp,
    smallest_context_parallel_size,
)

LINEAR = CostModel(0.0, 1.0, 0.0)
COST = CostModel(0.01, 1.0, 2.0, RingCost(bytes_per_second=10.0, key_value_bytes=3.0))


@pytest.mark.parametrize(
    ("longest", "size"), [(1, 1), (10, 1), (11, 2), (21, 3), (31, 4), (41, 6), (61, 12), (120, 12)]
)
def test_smallest_divisor_that_holds_the_longest(longest: int, size: int) -> None:
    found = smallest_context_parallel_size([1, longest], num_ranks=12, tokens_per_rank=10)
    assert found == size


def test_by_hand() -> None:
    # 14 needs two ranks, so all are cut over two. Packs of 20: 12 + 8, 14 + 3, 8; the costliest to
    # the first group, the others to the second, and an empty one where a group has fewer.
    plan = plan_static_cp([14, 8, 8, 12, 3], num_ranks=4, tokens_per_rank=10, cost_model=LINEAR)
    plan.check()
    sequences = [
        [sorted({piece.sequence for piece in batch.pieces}) for batch in batches]
        for batches in plan.micro_batches
    ]
    # 3 is too short to be cut: whole on the first rank of its group.
    assert sequences == [[[1, 3], []], [[1, 3], []], [[0, 4], [2]], [[0], [2]]]
    assert plan.micro_batches[3][0].pieces == (Piece(0, 4, 11),)
    assert plan.micro_batches[2][0].num_tokens == 10


def test_short_sequences_are_not_cut() -> None:
    # Less than 2 cp = 8 tokens: whole, each on the rank with the fewest.
    plan = plan_static_cp([70, 7, 2, 6], num_ranks=4, tokens_per_rank=25, cost_model=LINEAR)
    plan.check()
    whole = [
        (rank, piece.sequence)
        for rank, batches in enumerate(plan.micro_batches)
        for batch in batches
        for piece in batch.pieces
        if piece.sequence
    ]
    assert whole == [(0, 1), (1, 3), (2, 2)]


def test_refusals() -> None:
    with pytest.raises(PlanError, match=r"sequence 1 has 50 tokens, but 4 ranks.*hold 40"):
        plan_static_cp([3, 50], num_ranks=4, tokens_per_rank=10, cost_model=LINEAR)
    with pytest.raises(PlanError, match="num_ranks is 0"):
        plan_static_cp([1], num_ranks=0, tokens_per_rank=1, cost_model=LINEAR)
    with pytest.raises(PlanError, match="sequence 0 has 0 tokens"):
        plan_static_cp([0], num_ranks=4, tokens_per_rank=10, cost_model=LINEAR)
    for size in (3, 1):
        with pytest.raises(PlanError, match=f"context_parallel_size is {size}.*least 2"):
            plan_static_cp(
                [11],
                num_ranks=4,
                tokens_per_rank=10,
                cost_model=LINEAR,
                context_parallel_size=size,
            )


@given(
    num_ranks=st.integers(1, 12),
    capacity=st.sampled_from((1, 2, 3, 10, 40)),
    multiple=st.integers(1, 3),
    data=st.data(),
)
def test_every_plan_is_sound(
    num_ranks: int, capacity: int, multiple: int, data: st.DataObject
) -> None:
    length = st.one_of(st.integers(1, num_ranks * capacity), st.integers(1, 2 * capacity))
    lengths = data.draw(st.lists(length.map(lambda n: min(n, num_ranks * capacity)), max_size=25))
    plan = plan_static_cp(
        lengths,
        num_ranks=num_ranks,
        tokens_per_rank=capacity,
        cost_model=COST,
        num_micro_batches_multiple=multiple,
    )
    plan.check()
    check_order(plan, num_pipeline_stages=2)
    counts = {len(batches) for batches in plan.micro_batches}
    assert len(counts) == 1
    assert counts.pop() % multiple == 0
    size = smallest_context_parallel_size(lengths, num_ranks=num_ranks, tokens_per_rank=capacity)
    for rank in range(num_ranks):
        group = range(rank // size * size, (rank // size + 1) * size)
        for row in row_layouts(plan, rank):
            assert all(set(ring.ranks) <= set(group) for ring in row.rings)
    for sequence, tokens in enumerate(lengths):
        holders = sum(
            any(piece.sequence == sequence for batch in batches for piece in batch.pieces)
            for batches in plan.micro_batches
        )
        if tokens >= 2 * size:
            assert holders == size
