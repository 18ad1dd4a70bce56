"""Packing: every plan is sound, limits hold, ranks are even, and it is quick."""

import random
import statistics
import time
from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import PlanError
from parallel.plan.cost import CostModel
from parallel.plan.packing import plan_packing
from parallel.plan.predict import micro_batch_seconds, predict
from parallel.plan.records import StepPlan

# About a 7B model's ratio of attention to the rest, and some cost for each micro-batch.
COST = CostModel(quadratic_seconds=2e-9, linear_seconds=9e-5, fixed_seconds=1e-3)
LINEAR = CostModel(quadratic_seconds=0.0, linear_seconds=1.0, fixed_seconds=0.0)


def _batch_lengths(plan: StepPlan) -> list[list[list[int]]]:
    return [
        [[piece.end for piece in batch.pieces] for batch in rank] for rank in plan.micro_batches
    ]


def _log_normal(num: int, *, median: float, cap: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [min(1 + int(median * generator.lognormvariate(0, 1.2)), cap) for _ in range(num)]


def test_by_hand() -> None:
    # Micro-batches of 10: best fit needs two, so each of the two ranks has one.
    plan = plan_packing([3, 7, 5, 5], num_ranks=2, tokens_per_rank=10, cost_model=LINEAR)
    assert _batch_lengths(plan) == [[[3, 7]], [[5, 5]]]


def test_one_more_round_is_shared_by_all() -> None:
    # 5 full micro-batches on 4 ranks: a second round there must be, so all ranks take part.
    plan = plan_packing([5] * 10, num_ranks=4, tokens_per_rank=10, cost_model=LINEAR)
    totals = [sum(map(sum, rank)) for rank in _batch_lengths(plan)]
    assert sorted(totals) == [10, 10, 15, 15]


def test_long_sequences_count_for_more_than_their_tokens() -> None:
    quadratic = CostModel(quadratic_seconds=1.0, linear_seconds=0.0, fixed_seconds=0.0)
    plan = plan_packing([8, *[2] * 16], num_ranks=2, tokens_per_rank=100, cost_model=quadratic)
    assert _batch_lengths(plan) == [[[8]], [[2] * 16]]


def test_micro_batches_of_a_rank_are_even_and_fall() -> None:
    plan = plan_packing(
        [6, 4, 4, 3, 3, 2, 2],
        num_ranks=1,
        tokens_per_rank=10,
        cost_model=COST,
        num_micro_batches_multiple=4,
    )
    seconds = list(micro_batch_seconds(plan, COST)[0])
    assert [batch.num_tokens for batch in plan.micro_batches[0]] == [6, 6, 6, 6]
    assert seconds == sorted(seconds, reverse=True)


def test_fewer_sequences_than_ranks() -> None:
    lengths = [4, 9]
    plan = plan_packing(lengths, num_ranks=4, tokens_per_rank=10, cost_model=COST)
    assert _batch_lengths(plan) == [[[9]], [[4]], [], []]
    even = plan_packing(
        lengths, num_ranks=4, tokens_per_rank=10, cost_model=COST, equal_num_micro_batches=True
    )
    assert _batch_lengths(even) == [[[9]], [[4]], [[]], [[]]]
    in_pairs = plan_packing(
        lengths, num_ranks=4, tokens_per_rank=10, cost_model=COST, num_micro_batches_multiple=2
    )
    # megatron's interleaved schedule runs no fewer micro-batches than it has stages, on any rank.
    assert _batch_lengths(in_pairs) == [[[9], []], [[4], []], [[], []], [[], []]]


def test_no_sequences() -> None:
    plan = plan_packing([], num_ranks=3, tokens_per_rank=10, cost_model=COST)
    plan.check()
    assert plan.micro_batches == ((), (), ())
    assert predict(plan, COST).efficiency == 1.0


@pytest.mark.parametrize(
    ("lengths", "complaint"),
    [
        ([3, 11], "sequence 1 has 11 tokens.* tokens_per_rank = 10; raise tokens_per_rank to 11"),
        ([3, 0], "sequence 1 has 0 tokens"),
        ([-2], "sequence 0 has -2 tokens"),
    ],
)
def test_impossible_lengths_are_named(lengths: list[int], complaint: str) -> None:
    with pytest.raises(PlanError, match=complaint):
        plan_packing(lengths, num_ranks=2, tokens_per_rank=10, cost_model=COST)


@pytest.mark.parametrize("name", ["num_ranks", "tokens_per_rank", "num_micro_batches_multiple"])
def test_impossible_limits_are_named(name: str) -> None:
    limits = {"num_ranks": 1, "tokens_per_rank": 1, "num_micro_batches_multiple": 1, name: 0}
    with pytest.raises(PlanError, match=f"{name} is 0"):
        plan_packing(
            [1],
            num_ranks=limits["num_ranks"],
            tokens_per_rank=limits["tokens_per_rank"],
            num_micro_batches_multiple=limits["num_micro_batches_multiple"],
            cost_model=COST,
        )


@given(
    lengths=st.lists(st.integers(1, 64), max_size=60),
    num_ranks=st.integers(1, 9),
    slack=st.integers(0, 64),
    multiple=st.integers(1, 4),
    equal=st.booleans(),
    cost=st.sampled_from((COST, LINEAR, CostModel(1.0, 0.0, 5.0))),
)
def test_every_plan_is_sound(
    lengths: list[int], num_ranks: int, slack: int, multiple: int, equal: bool, cost: CostModel
) -> None:
    capacity = max(lengths, default=1) + slack

    def make() -> StepPlan:
        return plan_packing(
            lengths,
            num_ranks=num_ranks,
            tokens_per_rank=capacity,
            cost_model=cost,
            num_micro_batches_multiple=multiple,
            equal_num_micro_batches=equal,
        )

    plan = make()
    plan.check()
    assert plan.num_ranks == num_ranks
    pieces = [p for rank in plan.micro_batches for batch in rank for p in batch.pieces]
    assert sorted(astuple(piece) for piece in pieces) == [(i, 0, n) for i, n in enumerate(lengths)]
    counts = [len(rank) for rank in plan.micro_batches]
    assert all(count % multiple == 0 for count in counts)
    if equal:
        assert len(set(counts)) == 1
    for rank in plan.micro_batches:
        # Empty micro-batches are there for the count alone, behind the others.
        num_filled = sum(1 for batch in rank if batch.pieces)
        assert all(batch.pieces for batch in rank[:num_filled])
        assert equal or len(rank) - max(num_filled, 1) < multiple
    assert make().digest() == plan.digest()


@given(lengths=st.lists(st.integers(1, 400), min_size=1, max_size=40), num_ranks=st.integers(1, 6))
def test_within_the_bound_of_greedy_scheduling(lengths: list[int], num_ranks: int) -> None:
    # Without limits this is longest-processing-time first: at most 4/3 of the best (Graham).
    plan = plan_packing(
        lengths, num_ranks=num_ranks, tokens_per_rank=sum(lengths), cost_model=LINEAR
    )
    assert predict(plan, LINEAR).step_seconds <= 4 / 3 * _best_makespan(lengths, num_ranks) + 1e-9


def _best_makespan(lengths: list[int], num_ranks: int) -> float:
    """A lower bound: the mean, the longest, and the shortest pair where a rank must take two."""
    longest = sorted(lengths, reverse=True)
    pair = longest[num_ranks - 1] + longest[num_ranks] if len(lengths) > num_ranks else 0
    return max(sum(lengths) / num_ranks, longest[0], pair)


@pytest.mark.parametrize("num_ranks", [8, 64, 256])
def test_ranks_are_even_on_long_tailed_lengths(num_ranks: int) -> None:
    efficiencies = []
    for seed in range(5):
        lengths = _log_normal(8 * num_ranks, median=900, cap=32768, seed=seed)
        plan = plan_packing(lengths, num_ranks=num_ranks, tokens_per_rank=32768, cost_model=COST)
        plan.check()
        efficiencies.append(predict(plan, COST).efficiency)
    assert statistics.median(efficiencies) >= 0.97, efficiencies
    assert min(efficiencies) >= 0.9, efficiencies


@pytest.mark.parametrize("fill", [0.2, 0.97, 0.999, 3.9])
def test_two_thousand_sequences_on_256_ranks_are_quick(fill: float) -> None:
    lengths = _log_normal(2000, median=400, cap=4000)
    capacity = max(4000, int(sum(lengths) / (256 * fill)))
    seconds = []
    for _ in range(5):
        start = time.process_time()
        plan_packing(lengths, num_ranks=256, tokens_per_rank=capacity, cost_model=COST)
        seconds.append(time.process_time() - start)
    # 15 to 30 ms where it was written; the wanted limit is 100 ms, the best of five for noise.
    assert min(seconds) < 0.1, seconds
