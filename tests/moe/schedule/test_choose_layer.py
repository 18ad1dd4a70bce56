"""What a full micro-batch sends under uniform routing."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from moe.schedule.choose_layer import LayerLoad, choose_for, hit_share
from moe.schedule.linear_cost import LinearCost
from moe.schedule.profile import LayerProfile, LegProfile


@pytest.mark.parametrize(
    ("num_experts", "topk", "parts"), [(8, 2, 4), (8, 2, 2), (6, 3, 3), (4, 4, 4), (4, 1, 1)]
)
def test_hit_share_is_that_of_all_choices(num_experts: int, topk: int, parts: int) -> None:
    choices = list(itertools.combinations(range(num_experts), topk))
    hits = sum(any(expert < num_experts // parts for expert in choice) for choice in choices)
    assert hit_share(num_experts, topk, parts=parts) == pytest.approx(hits / len(choices))


def test_bytes_of_one_leg_and_of_two() -> None:
    one = LayerLoad(
        num_tokens=100, num_experts=8, topk=2, num_ranks=4, num_nodes=None, row_bytes=10
    )
    to_rank, to_node = 1 - 15 / 28, 1 - 6 / 28
    assert one.leg_bytes == pytest.approx((1000 * 3 * to_rank,))
    two = LayerLoad(num_tokens=100, num_experts=8, topk=2, num_ranks=4, num_nodes=2, row_bytes=10)
    # All that is not for this rank's own place is passed on: half the ranks of both nodes.
    assert two.leg_bytes == pytest.approx((1000 * to_node, 1000 * 2 * to_rank))


def test_a_slow_link_is_overlapped_and_an_instant_one_is_not() -> None:
    load = LayerLoad(
        num_tokens=4096, num_experts=8, topk=2, num_ranks=2, num_nodes=None, row_bytes=4096
    )
    experts = LinearCost(1e-3, 1e-5)

    def choice(bytes_per_second: float) -> tuple[int, int]:
        leg = LegProfile("inter", LinearCost(2e-3, 1.0 / bytes_per_second))
        found = choose_for(LayerProfile((leg,), experts, experts, experts), load)
        return found[0].num_chunks, found[1].num_chunks

    assert min(choice(1e8)) >= 2
    assert choice(1e13) == (1, 1)


def test_centroids_go_to_one_place_each() -> None:
    """A quarter of 200 choices; half of them elsewhere, or 3 of 4 on other nodes' ranks."""
    load = LayerLoad(
        num_tokens=100, num_experts=8, topk=2, num_ranks=4, num_nodes=2, row_bytes=10, rate=0.25
    )
    assert load.num_rows == 50
    assert load.leg_bytes == (250.0, 250.0)
    assert replace(load, num_nodes=None).leg_bytes == (375.0,)
