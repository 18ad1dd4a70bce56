"""The exchange of ranks that share a sequence, against sums hop by hop."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.errors import PlanError
from parallel.plan.communication import RingCost
from parallel.plan.cost import CostModel
from parallel.plan.flops import ModelShape

RING = RingCost(
    bytes_per_second=100.0,
    key_value_bytes=50.0,
    query_bytes=100.0,
    latency_seconds=0.25,
    num_query_groups=4,
)
COST = CostModel(0.07, 3.0, 5.0, RING)


def test_ring_hop_by_hop() -> None:
    # 40 tokens on 4 ranks: a hop carries 10 tokens' keys and values, 500 bytes.
    forward_hop, backward_hop = 0.25 + 5.0, 0.25 + 15.0
    # Attention of 10 queries with a block of 10: 0.07 x 100 = 7, two sevenths of it forward.
    forward_compute, backward_compute = 2.0, 5.0
    exposed = 3 * (forward_hop - forward_compute) + 3 * (backward_hop - backward_compute)
    found = RING.ring_seconds(4, block_tokens=10, hop_seconds=7.0)
    assert float(found) == pytest.approx(exposed + 2 * 0.25)
    assert RING.ring_bytes(10, 4) == 3 * 500 + 3 * 1500


def test_what_computation_hides_costs_only_the_first_latency() -> None:
    assert float(RING.ring_seconds(4, block_tokens=10, hop_seconds=1e3)) == 0.5
    assert float(RING.ring_seconds(1, block_tokens=10, hop_seconds=0.0)) == 0.0


def test_all_to_all_needs_a_divisor_of_the_heads() -> None:
    # Each rank keeps a quarter: query and output 100 + 100, key and value 50 bytes a token.
    moved = 2 * 250 * 10 * 3 / 4
    assert RING.ulysses_bytes(10, 4) == moved
    assert float(RING.ulysses_seconds(4, block_tokens=10)) == pytest.approx(0.5 + moved / 100)
    assert RING.ulysses_seconds([3, 8], block_tokens=10).tolist() == [math.inf, math.inf]
    assert float(RING.ulysses_seconds(1, block_tokens=10)) == 0.0


def test_the_cheaper_exchange_is_taken() -> None:
    ring = float(RING.ring_seconds(4, block_tokens=10, hop_seconds=COST.quadratic_seconds * 100))
    heads = float(RING.ulysses_seconds(4, block_tokens=10))
    assert heads < ring
    assert COST.prefers_ulysses(40, 4)
    assert float(COST.exposed_seconds(40, 4)) == heads
    # Three ranks cannot divide four heads.
    assert not COST.prefers_ulysses(30, 3)
    assert float(COST.exposed_seconds(30, 3)) == pytest.approx(
        float(RING.ring_seconds(3, block_tokens=10, hop_seconds=7.0))
    )
    assert COST.exposed_seconds([40, 30], [4, 3]).tolist() == [
        float(COST.exposed_seconds(40, 4)),
        float(COST.exposed_seconds(30, 3)),
    ]


def test_without_communication_sharing_is_free() -> None:
    free = CostModel(0.07, 3.0, 5.0)
    assert float(free.exposed_seconds(40, 4)) == 0.0
    assert float(free.shared_seconds(40, 4)) == free.sequence_seconds(40) / 4
    assert not free.prefers_ulysses(40, 4)
    assert free.max_useful_ranks(40) == 40
    assert free.uneven_seconds(40, [10, 30]) == 0.0


def test_uneven_cuts_pay_for_the_largest_share() -> None:
    largest = float(RING.ring_seconds(2, block_tokens=30, hop_seconds=0.07 * 20**2))
    assert COST.uneven_seconds(40, [30, 10]) == largest
    assert largest > COST.uneven_seconds(40, [20, 20])


@given(
    length=st.integers(1, 100_000),
    bytes_per_second=st.floats(1.0, 1e6),
    latency=st.sampled_from((0.0, 1e-3, 1.0)),
)
def test_up_to_the_cap_hops_are_hidden_and_beyond_they_show(
    length: int, bytes_per_second: float, latency: float
) -> None:
    ring = RingCost(
        bytes_per_second=bytes_per_second, key_value_bytes=50.0, latency_seconds=latency
    )
    cost = CostModel(0.07, 3.0, 0.0, ring)
    cap = cost.max_useful_ranks(length)
    assert 1 <= cap <= length
    hidden = 2 * latency * (1 + 1e-9)
    if cap > 1:
        assert float(cost.exposed_seconds(length, cap)) <= hidden
    beyond = int(length / ring.hidden_tokens(0.07) * 1.01) + 2
    assert float(cost.exposed_seconds(length, beyond)) > hidden


def test_performance_formula_of_an_h100() -> None:
    # 600 TFLOP/s of attention, 50 GB/s, BF16: 24,000 tokens a rank with as many key-value heads as
    # queries, 3,000 with an eighth of them. There backward keys and gradients are all BF16.
    for num_query_groups, tokens in ((32, 24_000), (4, 3_000)):
        shape = ModelShape(
            num_layers=10,
            hidden_size=4096,
            ffn_hidden_size=11008,
            num_attention_heads=32,
            num_query_groups=num_query_groups,
            kv_channels=128,
            vocab_size=32000,
        )
        ring = RingCost.from_model(shape, bytes_per_second=50e9)
        cost = CostModel.from_model(shape, flops_per_second=600e12, communication=ring)
        forward_only = RingCost(
            bytes_per_second=50e9, key_value_bytes=ring.key_value_bytes, backward_factor=1.0
        )
        assert forward_only.hidden_tokens(cost.quadratic_seconds) == pytest.approx(tokens)
        # With float32 gradients backward sends 3 times as much for 2.5 times the work.
        assert ring.hidden_tokens(cost.quadratic_seconds) == pytest.approx(tokens * 3 / 2.5)
        assert ring.num_query_groups == num_query_groups
        assert ring.query_bytes == 10 * 4096 * 2


def test_latency_counts_in_every_layer() -> None:
    shape = ModelShape(
        num_layers=7,
        hidden_size=8,
        ffn_hidden_size=8,
        num_attention_heads=2,
        num_query_groups=1,
        kv_channels=4,
        vocab_size=10,
    )
    ring = RingCost.from_model(shape, bytes_per_second=1.0, latency_seconds=2.0)
    assert ring.latency_seconds == 14.0
    assert ring.key_value_bytes == 2 * 4 * 2 * 7


def test_forward_is_its_part_of_the_whole() -> None:
    # Linear layers 1 : 2, attention 1 : 2.5.
    assert COST.forward_seconds(10) == pytest.approx(0.07 * 100 / 3.5 + 3.0 * 10 / 3)


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("bytes_per_second", 0.0, "must be above 0"),
        ("bytes_per_second", float("nan"), "must be finite"),
        ("latency_seconds", -1.0, "latency_seconds is -1.0"),
        ("num_query_groups", -4, "num_query_groups is -4"),
    ],
)
def test_links_that_there_are_not(name: str, value: float, complaint: str) -> None:
    constants: dict[str, Any] = {"bytes_per_second": 1.0, "key_value_bytes": 1.0, name: value}
    with pytest.raises(PlanError, match=complaint):
        RingCost(**constants)
