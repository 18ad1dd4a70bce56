"""Equation 3 of ByteScale: how much may leave, and how few ranks are then enough."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import PlanError
from parallel.plan.cost import CostModel
from parallel.plan.hdp import plan_hdp
from parallel.plan.offload_ratio import HostMemory, fewest_ranks
from parallel.plan.records import most_tokens

# Forward of one layer: (s^2 / 3.5 x 0.035 + 3 s / 3) / 10 = 0.001 s^2 + 0.1 s.
COST = CostModel(0.035, 3.0, 0.0)
HOST = HostMemory(num_layers=10, activation_bytes=8.0, bytes_per_second=4.0)


def test_what_hides_behind_a_layer() -> None:
    assert HOST.offloadable == 0.8
    # 100 tokens: a layer takes 10 + 10 seconds, in which 80 of 800 bytes leave.
    assert HOST.most_ratio(100, COST) == pytest.approx(20 * 4 / 800)
    assert HOST.most_ratio(1900, COST) == pytest.approx(1.0)
    assert HOST.most_ratio(10_000, COST) == 1.0


def test_fewest_ranks_by_hand() -> None:
    assert fewest_ranks(100, 100, COST, HOST) == 1
    # 200 tokens: r = 0.15, so 200 (1 - 0.15 x 0.8) = 176 stay, too many for one rank.
    assert HOST.most_ratio(200, COST) == pytest.approx(0.15)
    assert fewest_ranks(200, 100, COST, HOST) == 2
    assert fewest_ranks(200, 176, COST, HOST) == 1
    # All but two layers may leave: a fifth stays.
    assert fewest_ranks(10_000, 100, COST, HOST) == 20
    assert fewest_ranks(10_000, 100, COST, None) == 100


def test_the_least_ratio_that_holds() -> None:
    assert HOST.ratio(100, tokens_per_rank=100) == 0.0
    ratio = HOST.ratio(125, tokens_per_rank=100)
    assert ratio == pytest.approx(0.2 / 0.8)
    assert 125 * (1 - ratio * HOST.offloadable) == pytest.approx(100)


def test_two_layers_have_nothing_to_offload() -> None:
    shallow = HostMemory(num_layers=2, activation_bytes=8.0, bytes_per_second=4.0)
    assert shallow.offloadable == 0.0
    assert fewest_ranks(10_000, 100, COST, shallow) == 100


@given(
    length=st.integers(1, 100_000),
    capacity=st.integers(1, 5000),
    layers=st.integers(1, 40),
    speed=st.floats(0.01, 1e4),
)
def test_no_other_ratio_needs_fewer(length: int, capacity: int, layers: int, speed: float) -> None:
    host = HostMemory(num_layers=layers, activation_bytes=8.0, bytes_per_second=speed)
    found = fewest_ranks(length, capacity, COST, host)
    most = host.most_ratio(length, COST)
    assert 0.0 <= most <= 1.0
    share = -(-length // found)
    assert share * (1 - most * host.offloadable) <= capacity * (1 + 1e-9)
    assert found <= -(-length // capacity)
    if found > 1:
        fewer = -(-length // (found - 1))
        assert fewer * (1 - most * host.offloadable) > capacity


def test_a_plan_with_host_memory() -> None:
    lengths = [10_000, 900, 900, 100]
    plan = plan_hdp(lengths, num_ranks=40, tokens_per_rank=200, cost_model=COST, host_memory=HOST)
    plan.check()
    assert plan.offloadable == 0.8
    ratios = {
        batch.offload_ratio
        for batches in plan.micro_batches
        for batch in batches
        if any(piece.sequence == 0 for piece in batch.pieces)
    }
    assert max(ratios) > 0.0
    for sequence, length in enumerate(lengths):
        most = HOST.most_ratio(length, COST)
        for batches in plan.micro_batches:
            for batch in batches:
                if any(piece.sequence == sequence for piece in batch.pieces):
                    assert batch.offload_ratio <= most + 1e-9
    # Without it the ranks cannot hold the longest.
    with pytest.raises(PlanError, match=r"10000 tokens and needs 50 ranks.*there are 40"):
        plan_hdp(lengths, num_ranks=40, tokens_per_rank=200, cost_model=COST)


def test_a_pipeline_offloads_only_what_it_must() -> None:
    fits = plan_hdp(
        [4000, 100],
        num_ranks=40,
        tokens_per_rank=200,
        cost_model=COST,
        num_pipeline_stages=2,
        host_memory=HOST,
    )
    assert {b.offload_ratio for batches in fits.micro_batches for b in batches} == {0.0}
    too_long = plan_hdp(
        [10_000, 100],
        num_ranks=40,
        tokens_per_rank=200,
        cost_model=COST,
        num_pipeline_stages=2,
        host_memory=HOST,
    )
    too_long.check()
    assert max(b.offload_ratio for batches in too_long.micro_batches for b in batches) > 0


def test_memory_that_there_is_not() -> None:
    with pytest.raises(PlanError, match="num_layers is 0"):
        HostMemory(num_layers=0, activation_bytes=1.0, bytes_per_second=1.0)
    with pytest.raises(PlanError, match="activation_bytes is 0"):
        HostMemory(num_layers=1, activation_bytes=0.0, bytes_per_second=1.0)


@given(st.integers(1, 10_000), st.integers(2, 100))
def test_a_rank_holds_no_token_more_and_none_less(capacity: int, num_layers: int) -> None:
    # C / (1 - (l - 2) / l) = C l / 2, although a third has no float: 3 tokens for C = 2, l = 3.
    host = HostMemory(num_layers=num_layers, activation_bytes=1.0, bytes_per_second=1.0)
    assert most_tokens(capacity, host.offloadable) == capacity * num_layers // 2
