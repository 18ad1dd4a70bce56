"""Experts spread over ranks: N ranks equal one rank, whoever has tokens and wherever they go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe.dispatch.exact import ExactDispatcher
from moe.reference import dense_loop
from tests.moe.routed_case import RoutedCase, in_parts, output_and_gradients, routing_of
from tests.rank_pool import RankError, Ranks

# (case of the whole, tokens of each rank).
SPLITS = {
    "even": (RoutedCase(24, 8, 2), {2: [12, 12], 4: [6, 6, 6, 6]}),
    "uneven": (RoutedCase(24, 8, 3), {2: [17, 7], 4: [1, 9, 13, 1]}),
    "none on one rank": (RoutedCase(24, 8, 2), {2: [24, 0], 4: [10, 0, 4, 10]}),
    "all to one expert": (RoutedCase(24, 8, 1, choice="all to one"), {2: [9, 15], 4: [6, 6, 6, 6]}),
    "none for one expert": (
        RoutedCase(24, 4, 2, choice="none for one"),
        {2: [12, 12], 4: [5, 7, 5, 7]},
    ),
    "one token": (RoutedCase(1, 4, 2), {2: [0, 1], 4: [0, 0, 1, 0]}),
    "no token": (RoutedCase(0, 4, 2), {2: [0, 0], 4: [0, 0, 0, 0]}),
    "every expert for every token": (RoutedCase(9, 4, 4), {2: [4, 5], 4: [1, 2, 3, 3]}),
}


def spread(case: RoutedCase, lengths: list[int], dtype: torch.dtype) -> dict[str, Any]:
    """This rank's part of the layer: its tokens and its experts."""
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    assert group is not None
    first = sum(lengths[:rank])
    mine = slice(first, first + lengths[rank])
    tokens, weights, fc1, fc2 = (leaf.clone() for leaf in case.leaves(dtype))
    num_local = case.num_experts // size
    local = slice(rank * num_local, (rank + 1) * num_local)
    leaves = [
        tensor.clone().requires_grad_()
        for tensor in (tokens[mine], weights[mine], fc1[local], fc2[local])
    ]
    routing = routing_of(case.experts()[mine], leaves[1], num_experts=case.num_experts)
    dispatcher = ExactDispatcher(group=group)
    output = in_parts(dispatcher)(leaves[0], routing, leaves[2], leaves[3])
    grads = torch.autograd.grad(output, leaves, case.grad(dtype)[mine])
    trip = dispatcher.dispatch(leaves[0], routing)
    return {
        "parts": [output.detach(), *grads],
        "num_received": trip.rows.shape[0],
        "counts": trip.counts.tolist(),
    }


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", SPLITS)
def test_ranks_equal_one_rank(ranks: Ranks, name: str, world_size: int) -> None:
    case, lengths = SPLITS[name][0], SPLITS[name][1][world_size]
    reports = ranks.run(world_size, spread, case, lengths, torch.float64)
    expected = output_and_gradients(dense_loop, case, torch.float64)
    names = ("output", "gradient of tokens", "of weights", "of linear_fc1", "of linear_fc2")
    for index, part in enumerate(names):
        # Tokens and experts both stand in the order of the ranks.
        found = torch.cat([report["parts"][index] for report in reports])
        torch.testing.assert_close(found, expected[index], msg=f"{name}, {world_size}: {part}")
    # No token is lost, and each expert gets exactly those that chose it.
    counts = [count for report in reports for count in report["counts"]]
    chosen = case.experts().reshape(-1)
    assert counts == torch.bincount(chosen, minlength=case.num_experts).tolist()
    assert [report["num_received"] for report in reports] == [
        sum(report["counts"]) for report in reports
    ]


def test_one_rank_is_a_group_too(ranks: Ranks) -> None:
    case = RoutedCase(10, 4, 2)
    (report,) = ranks.run(1, spread, case, [10], torch.float64)
    expected = output_and_gradients(dense_loop, case, torch.float64)
    torch.testing.assert_close(report["parts"], expected)


def test_experts_that_cannot_be_shared_evenly_are_refused(ranks: Ranks) -> None:
    with pytest.raises(RankError, match="3 experts cannot be shared by 2 ranks"):
        ranks.run(2, spread, RoutedCase(4, 3, 1), [2, 2], torch.float32)
