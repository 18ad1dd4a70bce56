"""The bound of a pipeline: below every plan, and near the best where the best is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.plan.communication import RingCost
from parallel.plan.cost import CostModel
from parallel.plan.cuts import cut, even_shares
from parallel.plan.pipeline_bound import RowBound, pipeline_bound
from parallel.plan.predict import predict
from parallel.plan.records import MicroBatch, Piece, StepPlan

RING = RingCost(
    bytes_per_second=10.0,
    key_value_bytes=2.0,
    query_bytes=3.0,
    latency_seconds=0.1,
    num_query_groups=4,
)
COSTS = (
    CostModel(0.01, 1.0, 2.0, RING),
    CostModel(0.0, 1.0, 0.0),
    CostModel(1.0, 0.0, 0.0),
    CostModel(0.1, 0.1, 0.0, RING),
)


def _bound(
    lengths: list[int], cost: CostModel, *, num_ranks: int, capacity: int, stages: int
) -> RowBound:
    return pipeline_bound(
        lengths,
        cost,
        num_ranks=num_ranks,
        tokens_per_rank=capacity,
        max_ranks_per_sequence=num_ranks,
        num_pipeline_stages=stages,
    )


@st.composite
def _plans(draw: st.DrawFn) -> StepPlan:
    """Sequences over any ranks with any cuts, whole ones also in the micro-batches of others."""
    num_ranks = draw(st.integers(1, 5))
    ranks: list[list[list[Piece]]] = [[] for _ in range(num_ranks)]
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=9))
    by_heads = []
    for sequence, length in enumerate(lengths):
        holders = draw(
            st.lists(st.integers(0, num_ranks - 1), min_size=1, max_size=length, unique=True)
        )
        shares = even_shares(length, len(holders))
        if len(holders) == 2 and draw(st.booleans()):
            moved = draw(st.integers(0, shares[1] - 1))
            shares = [shares[0] + moved, shares[1] - moved]
        row = max(len(ranks[rank]) for rank in holders)
        if len(holders) == 1 and row and draw(st.booleans()):
            row = draw(st.integers(0, row - 1))
        elif len(holders) > 1 and 4 % len(holders) == 0 and draw(st.booleans()):
            by_heads.append(sequence)
        for rank, part in zip(holders, cut(sequence, shares), strict=True):
            ranks[rank] += [[] for _ in range(row + 1 - len(ranks[rank]))]
            ranks[rank][row] += part
    return StepPlan(
        tuple(lengths),
        max(sum(p.num_tokens for p in pieces) for rank in ranks for pieces in rank),
        tuple(tuple(MicroBatch(tuple(pieces)) for pieces in rank) for rank in ranks),
        ulysses=tuple(by_heads),
    )


@settings(max_examples=400)
@given(_plans(), st.sampled_from(COSTS), st.integers(2, 5))
def test_no_plan_beats_the_bound(plan: StepPlan, cost: CostModel, stages: int) -> None:
    found = predict(plan, cost, num_pipeline_stages=stages, max_ranks_per_sequence=plan.num_ranks)
    assert 0 < found.bound_seconds <= found.step_seconds * (1 + 1e-9)


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_equal_sequences(stages: int) -> None:
    # 24 of 10 tokens on 2 ranks, 1 s a token, g = 5, m rows each: (m + p - 1) (120 / m + 5).
    cost = CostModel(0.0, 1.0, 5.0)
    best = min((m + stages - 1) * (120 / m + 5) for m in range(1, 121))
    found = _bound([10] * 24, cost, num_ranks=2, capacity=1000, stages=stages)
    assert 0.985 * best <= found.seconds <= best
    assert found.row_tokens == pytest.approx(
        120 / max(1.0, ((stages - 1) * 120 / 5) ** 0.5), rel=0.2
    )


def test_one_giant() -> None:
    # p times its row, and nothing else could be meanwhile.
    cost = CostModel(0.01, 1.0, 2.0)
    found = _bound([400], cost, num_ranks=8, capacity=100, stages=3)
    row = (0.01 * 400**2 + 400) / 8 + 2
    assert 0.99 * 3 * row <= found.seconds <= 3 * row
    assert found.longest_seconds == pytest.approx(row, rel=0.02)


def test_many_long_sequences_ask_for_more_than_the_longest() -> None:
    # Each needs a rank of its own for the whole step, because an exchange costs too much.
    slow = RingCost(bytes_per_second=1e-3, key_value_bytes=1.0)
    cost = CostModel(1.0, 1e-3, 0.0, slow)
    one = _bound([100, *[1] * 400], cost, num_ranks=4, capacity=200, stages=4).seconds
    four = _bound([100] * 4 + [1] * 400, cost, num_ranks=4, capacity=200, stages=4).seconds
    assert one == pytest.approx(4 * 1e4, rel=0.01)
    assert four == pytest.approx(4 * 1e4, rel=0.01)
    five = _bound([100] * 6, cost, num_ranks=4, capacity=200, stages=4).seconds
    assert five > 4.2 * 1e4


def test_it_is_the_least_over_all_row_lengths() -> None:
    generator = np.random.default_rng(1)
    lengths = np.clip(generator.lognormal(3, 1, 200), 1, 400).astype(int).tolist()
    cost = CostModel(0.01, 1.0, 2.0, RING)
    free = _bound(lengths, cost, num_ranks=8, capacity=400, stages=4)
    for capacity in (50, 60, 80, 150, 300):
        limited = _bound(lengths, cost, num_ranks=8, capacity=capacity, stages=4)
        assert limited.row_tokens <= capacity
        assert limited.seconds >= free.seconds * 0.99
