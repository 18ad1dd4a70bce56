"""megatron-core's scheduler as a planner: its groups as they come, as valid plans."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.hybrid_cp_planner import plan_hybrid_cp
from parallel.errors import PlanError
from parallel.plan.meetings import check_order
from parallel.plan.rings import row_layouts


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=40),
    num_ranks=st.sampled_from([1, 2, 4, 8]),
)
def test_plans_are_valid_and_use_powers_of_two(lengths: list[int], num_ranks: int) -> None:
    capacity = 400
    plan = plan_hybrid_cp(lengths, num_ranks=num_ranks, tokens_per_rank=capacity)
    plan.check()
    for rank in range(num_ranks):
        for layout in row_layouts(plan, rank):
            # None where a sequence has fewer tokens than ranks.
            assert len(layout.whole) + len(layout.rings) <= 1, "nothing is packed"
            for ring in layout.rings:
                size = len(ring.ranks)
                # A sequence of fewer tokens than parts leaves some of its ranks without any.
                assert size & (size - 1) == 0 or ring.num_tokens(0) <= 1


LENGTHS = [500, 30_000, 9000, 9000, 9000, 12_000, 3000, 3000]


def test_pipelines_and_experts_get_empty_micro_batches_where_the_rule_asks() -> None:
    plain = plan_hybrid_cp(LENGTHS, num_ranks=4, tokens_per_rank=8192)
    check_order(plain, num_pipeline_stages=1)
    with pytest.raises(PlanError, match="must have the same index"):
        check_order(plain, num_pipeline_stages=2)
    unequal = plan_hybrid_cp([5, 64, 1], num_ranks=2, tokens_per_rank=64)
    with pytest.raises(PlanError, match="must run equally many"):
        check_order(unequal, num_pipeline_stages=1, expert_parallel_size=2)
    aligned = plan_hybrid_cp(LENGTHS, num_ranks=4, tokens_per_rank=8192, num_pipeline_stages=2)
    check_order(aligned, num_pipeline_stages=2)
    # The same micro-batches in the same order, with empty ones between.
    assert [[b for b in rank if b.pieces] for rank in aligned.micro_batches] == [
        list(rank) for rank in plain.micro_batches
    ]


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 1600), max_size=30),
    num_ranks=st.sampled_from([4, 8]),
    stages=st.integers(1, 3),
    num_chunks=st.integers(1, 2),
    experts=st.sampled_from([1, 2, 4]),
)
def test_plans_obey_the_ordering_rule(
    lengths: list[int], num_ranks: int, stages: int, num_chunks: int, experts: int
) -> None:
    num_chunks = num_chunks if stages > 1 else 1
    plan = plan_hybrid_cp(
        lengths,
        num_ranks=num_ranks,
        tokens_per_rank=400,
        num_pipeline_stages=stages,
        num_micro_batches_multiple=stages if num_chunks > 1 else 1,
        expert_parallel_size=experts,
    )
    plan.check()
    check_order(
        plan,
        num_pipeline_stages=stages,
        num_model_chunks=num_chunks,
        expert_parallel_size=experts,
    )


def test_a_sequence_over_the_capacity_is_spread() -> None:
    plan = plan_hybrid_cp([1000, 10, 10, 10], num_ranks=4, tokens_per_rank=256)
    plan.check()
    holders = {
        rank
        for rank, batches in enumerate(plan.micro_batches)
        for batch in batches
        for piece in batch.pieces
        if piece.sequence == 0
    }
    assert holders == {0, 1, 2, 3}


def test_what_it_cannot_plan_is_refused_with_the_numbers() -> None:
    with pytest.raises(PlanError, match="power of two of data-parallel ranks, not 3"):
        plan_hybrid_cp([10], num_ranks=3, tokens_per_rank=100)
    with pytest.raises(PlanError, match="300 tokens is longer than 2 ranks x 100"):
        plan_hybrid_cp([300], num_ranks=2, tokens_per_rank=100)
