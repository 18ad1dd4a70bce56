"""Cut into chunks a layer is the same layer: whoever has tokens, however each pass is cut."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from moe.dispatch.exact import ExactDispatcher
from moe.dispatch.hierarchical import HierarchicalDispatcher, make_node_groups
from moe.reference import dense_loop
from moe.schedule.choose import Chunking
from moe.schedule.chunked import ChunkedExperts
from moe.schedule.lanes import ThreadLanes
from moe.schedule.serial import SerialExperts
from tests.moe.routed_case import Layer, RoutedCase, output_and_gradients, routing_of
from tests.rank_pool import Ranks

# (case of the whole, tokens of each of 2 or 4 ranks).
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
CUTS = [(1, 1), (2, 2), (3, 2), (1, 4), (5, 1), (13, 7)]
PARTS = ("output", "gradient of tokens", "of weights", "of linear_fc1", "of linear_fc2")


def layers(
    case: RoutedCase,
    lengths: list[int],
    cuts: list[tuple[int, int]],
    is_recomputed: bool = False,
    has_nowhere: bool = False,
    ranks_per_node: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> dict[Any, list[torch.Tensor]]:
    """This rank's output and gradients: uncut, and for each cut.

    has_nowhere: every third token's last choice is dropped.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    assert group is not None
    first = sum(lengths[:rank])
    mine = slice(first, first + lengths[rank])
    tokens, weights, fc1, fc2 = case.leaves(dtype)
    num_local = case.num_experts // size
    local = slice(rank * num_local, (rank + 1) * num_local)
    leaves = [
        part.clone().requires_grad_()
        for part in (tokens[mine], weights[mine], fc1[local], fc2[local])
    ]
    dispatcher: ExactDispatcher | HierarchicalDispatcher = ExactDispatcher(group)
    if ranks_per_node is not None:
        groups = make_node_groups(group, ranks_per_node=ranks_per_node)
        dispatcher = HierarchicalDispatcher(groups)
    lanes = ThreadLanes()
    experts = case.experts()
    if has_nowhere:
        experts[::3, -1] = case.num_experts
    found = {}
    for cut in (None, *cuts):
        layer: Layer = SerialExperts(dispatcher)
        if cut is not None:
            layer = ChunkedExperts(
                dispatcher, lanes, forward=Chunking.of(cut[0]), backward=Chunking.of(cut[1])
            )

        def run(tokens: Any, weights: Any, fc1: Any, fc2: Any, layer: Any = layer) -> Any:
            is_nowhere = experts[mine] == case.num_experts
            routing = routing_of(experts[mine], weights, num_experts=case.num_experts + has_nowhere)
            if has_nowhere:
                routing = replace(
                    routing,
                    weights=routing.weights.masked_fill(is_nowhere, 0.0),
                    probabilities=routing.probabilities[:, :-1],
                    counts=routing.counts[:-1],
                    dropped=torch.zeros_like(routing.counts[:-1]),
                )
            return layer(tokens, routing, fc1, fc2)

        output = checkpoint(run, *leaves, use_reentrant=False) if is_recomputed else run(*leaves)
        grads = torch.autograd.grad(output, leaves, case.grad(dtype)[mine])
        found[cut] = [output.detach(), *grads]
    return found


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", SPLITS)
def test_chunks_on_ranks_equal_one_rank(ranks: Ranks, name: str, world_size: int) -> None:
    case, lengths = SPLITS[name][0], SPLITS[name][1][world_size]
    reports = ranks.run(world_size, layers, case, lengths, CUTS)
    expected = output_and_gradients(dense_loop, case, torch.float64)
    for cut in (None, *CUTS):
        for index, part in enumerate(PARTS):
            found = torch.cat([report[cut][index] for report in reports])
            message = f"{name}, cut {cut}: {part}"
            torch.testing.assert_close(found, expected[index], msg=message)


def test_with_recomputation(ranks: Ranks) -> None:
    case = RoutedCase(24, 8, 3)
    reports = ranks.run(2, layers, case, [15, 9], [(2, 3), (4, 4)], is_recomputed=True)
    expected = output_and_gradients(dense_loop, case, torch.float64)
    for cut in ((2, 3), (4, 4)):
        for index in range(len(PARTS)):
            found = torch.cat([report[cut][index] for report in reports])
            torch.testing.assert_close(found, expected[index])


@pytest.mark.parametrize("lengths", [[6, 6, 6, 6], [1, 9, 0, 14]])
def test_two_legs(ranks: Ranks, lengths: list[int]) -> None:
    """Two nodes of two ranks; also regrouped between forward and backward."""
    case, cuts = RoutedCase(24, 8, 3), [(2, 2), (3, 2), (1, 5)]
    reports = ranks.run(4, layers, case, lengths, cuts, ranks_per_node=2)
    expected = output_and_gradients(dense_loop, case, torch.float64)
    for cut in cuts:
        for index in range(len(PARTS)):
            found = torch.cat([report[cut][index] for report in reports])
            torch.testing.assert_close(found, expected[index])


def test_choices_that_lead_nowhere(ranks: Ranks) -> None:
    case, cuts = RoutedCase(24, 8, 2), [(2, 2), (3, 4)]
    for report in ranks.run(2, layers, case, [15, 9], cuts, has_nowhere=True):
        for cut in cuts:
            for found, expected in zip(report[cut], report[None], strict=True):
                torch.testing.assert_close(found, expected)


def test_float32_differs_by_rounding_of_products_only(ranks: Ranks) -> None:
    """A product of fewer rows may be summed in another order: 64 terms, then 128, of 2^-24."""
    case = RoutedCase(200, 8, 2, hidden_size=64, ffn_size=128)
    cuts = [(2, 2), (4, 3)]
    for report in ranks.run(2, layers, case, [120, 80], cuts, dtype=torch.float32):
        for cut in cuts:
            for found, expected in zip(report[cut], report[None], strict=True):
                difference = (found - expected).norm() / expected.norm()
                assert difference <= 1e-6
