"""Ranks that measure together agree to the last bit, and change nothing."""

from __future__ import annotations

import torch
import torch.distributed as dist

from moe.schedule.choose import Chunking
from moe.schedule.choose_layer import LayerLoad, choose_for
from moe.schedule.profile import LayerProfile, LegProfile, measure_experts, measure_leg
from tests.rank_pool import Ranks


def measured() -> tuple[LayerProfile, tuple[Chunking, Chunking], bool]:
    group = dist.group.WORLD
    assert group is not None
    load = LayerLoad(
        num_tokens=256, num_experts=8, topk=2, num_ranks=2, num_nodes=None, row_bytes=256
    )
    weights = torch.randn(4, 64, 64), torch.randn(4, 64, 32)
    before = [weight.clone() for weight in weights]
    leg = measure_leg(
        group, num_bytes=int(load.leg_bytes[0]), everybody=group, device=torch.device("cpu")
    )
    costs = measure_experts(*weights, num_rows=load.num_rows, everybody=group)
    profile = LayerProfile((LegProfile("inter", leg),), *costs)
    is_unchanged = all(map(torch.equal, before, weights))
    return profile, choose_for(profile, load), is_unchanged


def test_all_ranks_measure_and_choose_the_same(ranks: Ranks) -> None:
    first, second = ranks.run(2, measured)
    assert first == second
    profile, _, is_unchanged = first
    assert is_unchanged
    assert profile.legs[0].cost.seconds(1 << 16) > 0
    assert profile.forward.seconds(512) > 0
