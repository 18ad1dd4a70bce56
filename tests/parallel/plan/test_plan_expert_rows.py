"""Groups of experts without a pipeline: equal rows, even groups, blocks over whole groups."""

import time

import numpy as np
import pytest

from parallel.plan.communication import RingCost
from parallel.plan.cost import CostModel
from parallel.plan.expert_rows import plan_expert_rows
from parallel.plan.meetings import check_order
from parallel.plan.predict import predict
from parallel.plan.records import StepPlan

LINEAR = CostModel(0.0, 1.0, 0.0)
QUADRATIC = CostModel(1e-3, 1.0, 0.5)


def _plan(
    lengths: list[int], *, num_ranks: int, experts: int, cost: CostModel, capacity: int = 10
) -> StepPlan:
    plan = plan_expert_rows(
        lengths,
        num_ranks=num_ranks,
        tokens_per_rank=capacity,
        cost_model=cost,
        expert_parallel_size=experts,
    )
    plan.check()
    check_order(plan, num_pipeline_stages=1, expert_parallel_size=experts)
    return plan


def _holders(plan: StepPlan, sequence: int) -> list[int]:
    return [
        rank
        for rank, batches in enumerate(plan.micro_batches)
        if any(piece.sequence == sequence for batch in batches for piece in batch.pieces)
    ]


def test_rows_of_like_length() -> None:
    plan = _plan([9, 9, 9, 9, 4, 4, 4, 4], num_ranks=4, experts=2, cost=LINEAR)
    tokens = [[batch.num_tokens for batch in batches] for batches in plan.micro_batches]
    assert tokens[0] == tokens[1]
    assert tokens[2] == tokens[3]
    assert predict(plan, LINEAR, expert_parallel_size=2).efficiency == 1.0


def test_a_long_sequence_takes_whole_groups() -> None:
    plan = _plan([50, 9, 9], num_ranks=8, experts=4, cost=LINEAR)
    holders = _holders(plan, 0)
    assert len(holders) == 8
    plan = _plan([35, *[9] * 16], num_ranks=8, experts=4, cost=LINEAR)
    assert _holders(plan, 0) in ([0, 1, 2, 3], [4, 5, 6, 7], list(range(8)))


def test_sequences_over_parts_of_a_group_run_beside_each_other() -> None:
    # Two over two ranks each fill a row of four.
    plan = _plan([20, 20, *[1] * 8], num_ranks=4, experts=4, cost=QUADRATIC, capacity=12)
    first, second = _holders(plan, 0), _holders(plan, 1)
    assert predict(plan, QUADRATIC, expert_parallel_size=4).efficiency > 0.9
    assert not set(first) & set(second) or len(first) == 4


@pytest.mark.parametrize("seed", range(4))
def test_groups_end_together(seed: int) -> None:
    generator = np.random.default_rng(seed)
    lengths = np.clip(generator.lognormal(4.5, 1.3, 1500), 1, 6000).astype(int).tolist()
    plan = _plan(lengths, num_ranks=16, experts=4, cost=CostModel(1e-4, 1.0, 1.0), capacity=1500)
    found = predict(plan, CostModel(1e-4, 1.0, 1.0), expert_parallel_size=4)
    assert found.efficiency >= 0.97


def test_rows_in_a_long_gap_are_no_more_than_the_sequences() -> None:
    # Three hops of 10 seconds each beside rows of 0.01: a gap holds thousands, but 36 sequences
    # fill no more than 36.
    slow = RingCost(
        bytes_per_second=1e4,
        key_value_bytes=2.0,
        query_bytes=3.0,
        latency_seconds=10.0,
        num_query_groups=4,
    )
    cost = CostModel(1e-6, 1e-3, 1e-2, slow)
    lengths = [280, 202, 96, 83, 81, 58, 54, 46, 36, 34, 29, 26, 26, 21, 15, 13, 12, 11, 10, 9, 9]
    began = time.process_time()
    _plan([*lengths, 7, 5, 4, 4, 4, 3, 3, *[1] * 8], num_ranks=28, experts=4, cost=cost)
    # 0.02 s; 1.4 with the rows that have no sequence.
    assert time.process_time() - began < 0.5
