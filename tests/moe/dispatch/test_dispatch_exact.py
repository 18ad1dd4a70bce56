"""Experts spread over ranks: N ranks equal one rank, and no row is sent that need not be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe.dispatch.exact import ExactDispatcher
from moe.dispatch.hierarchical import HierarchicalDispatcher, make_node_groups
from moe.dispatch.hooks import Hooks
from moe.reference import dense_loop
from moe.schedule.serial import SerialExperts
from moe.segment_sum import segment_sum
from tests.moe.routed_case import RoutedCase, output_and_gradients, routing_of
from tests.rank_pool import RankError, Ranks

Way = Literal["exact", "2 a node", "1 a node", "one node"]

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
    "some nowhere": (
        RoutedCase(24, 8, 3, dropped_share=0.4),
        {2: [17, 7], 4: [1, 9, 13, 1]},
    ),
    "all nowhere": (RoutedCase(6, 4, 2, dropped_share=1.0), {2: [4, 2], 4: [1, 2, 0, 3]}),
}
WAYS: dict[int, tuple[Way, ...]] = {
    2: ("exact", "1 a node"),
    4: ("exact", "2 a node", "1 a node", "one node"),
}


def make_dispatcher(way: Way) -> ExactDispatcher | HierarchicalDispatcher:
    group = dist.group.WORLD
    assert group is not None
    if way == "exact":
        return ExactDispatcher(group=group)
    ranks_per_node = {"2 a node": 2, "1 a node": 1, "one node": group.size()}[way]
    return HierarchicalDispatcher(make_node_groups(group, ranks_per_node=ranks_per_node))


def spread(
    way: Way, cases: list[tuple[RoutedCase, list[int]]], dtype: torch.dtype
) -> list[dict[str, Any]]:
    """This rank's part of each layer: its tokens and its experts."""
    dispatcher = make_dispatcher(way)
    return [spread_one(dispatcher, case, lengths, dtype) for case, lengths in cases]


def spread_one(
    dispatcher: ExactDispatcher | HierarchicalDispatcher,
    case: RoutedCase,
    lengths: list[int],
    dtype: torch.dtype,
) -> dict[str, Any]:
    rank, size = dist.get_rank(), dist.get_world_size()
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
    before = sent_bytes(dispatcher)
    output = SerialExperts(dispatcher)(leaves[0], routing, leaves[2], leaves[3])
    forward = sent_bytes(dispatcher)
    grads = torch.autograd.grad(output, leaves, case.grad(dtype)[mine])
    backward = sent_bytes(dispatcher)
    trip = dispatcher.dispatch(leaves[0], routing, Hooks())
    return {
        "parts": [output.detach(), *grads],
        "num_received": trip.rows.shape[0],
        "counts": trip.counts.tolist(),
        "forward bytes": [b - a for a, b in zip(before, forward, strict=True)],
        "backward bytes": [b - a for a, b in zip(forward, backward, strict=True)],
    }


def sent_bytes(dispatcher: ExactDispatcher | HierarchicalDispatcher) -> list[int]:
    """Of rows, in each leg's channel, to other ranks."""
    return [channel.rows.num_bytes_sent for channel in dispatcher.channels]


def least_rows(way: Way, case: RoutedCase, lengths: list[int]) -> tuple[list[int], list[int]]:
    """Rows that cross in all from (place to place on the way out) each leg, by the table alone.

    A pair (token, rank) or (token, node) crosses once, if the token does not start there.
    """
    size = len(lengths)
    per_node = {"exact": 1, "2 a node": 2, "1 a node": 1, "one node": size}[way]
    num_local = case.num_experts // size
    across, inside = [0] * size, [0] * size
    owners = [rank for rank, length in enumerate(lengths) for _ in range(length)]
    for owner, experts in zip(owners, case.experts().tolist(), strict=True):
        ranks = {expert // num_local for expert in experts if expert < case.num_experts}
        for node in {rank // per_node for rank in ranks}:
            across[owner] += node != owner // per_node
            entry = node * per_node + owner % per_node
            inside[entry] += sum(r != entry and r // per_node == node for r in ranks)
    return across, inside


def check(way: Way, name: str, case: RoutedCase, lengths: list[int], reports: list[Any]) -> None:
    expected = output_and_gradients(dense_loop, case, torch.float64)
    names = ("output", "gradient of tokens", "of weights", "of linear_fc1", "of linear_fc2")
    for index, part in enumerate(names):
        # Tokens and experts both stand in the order of the ranks.
        found = torch.cat([report["parts"][index] for report in reports])
        torch.testing.assert_close(found, expected[index], msg=f"{name}, {way}: {part}")
    # No token is lost, and each expert gets exactly those that chose it.
    counts = [count for report in reports for count in report["counts"]]
    chosen = case.experts().reshape(-1)
    wanted = torch.bincount(chosen, minlength=case.num_experts)[: case.num_experts].tolist()
    assert counts == wanted
    assert [report["num_received"] for report in reports] == [
        sum(report["counts"]) for report in reports
    ]
    check_bytes(way, case, lengths, reports)


def check_bytes(way: Way, case: RoutedCase, lengths: list[int], reports: list[Any]) -> None:
    """Forward each crossing row goes out and comes home once, backward the same; 1.00 of it."""
    least = least_rows(way, case, lengths)[: 1 if way == "exact" else 2]
    row_bytes = 8 * case.hidden_size
    for direction in ("forward bytes", "backward bytes"):
        sent = [report[direction] for report in reports]
        for leg, rows in enumerate(least):
            # What one rank sends out another sends home.
            assert sum(bytes_[leg] for bytes_ in sent) == 2 * sum(rows) * row_bytes, direction


@pytest.mark.parametrize(("world_size", "way"), [(n, way) for n in WAYS for way in WAYS[n]])
def test_ranks_equal_one_rank(ranks: Ranks, world_size: int, way: Way) -> None:
    cases = {name: (case, lengths[world_size]) for name, (case, lengths) in SPLITS.items()}
    reports = ranks.run(world_size, spread, way, list(cases.values()), torch.float64)
    for index, (name, (case, lengths)) in enumerate(cases.items()):
        check(way, name, case, lengths, [report[index] for report in reports])


@st.composite
def spread_cases(draw: st.DrawFn) -> tuple[RoutedCase, list[int]]:
    """Any routing table on four ranks."""
    lengths = draw(st.lists(st.integers(0, 6), min_size=4, max_size=4))
    num_experts = draw(st.sampled_from([4, 8, 12]))
    case = RoutedCase(
        sum(lengths),
        num_experts,
        draw(st.integers(1, min(5, num_experts))),
        hidden_size=draw(st.integers(1, 5)),
        choice=draw(st.sampled_from(["random", "all to one", "none for one"])),
        seed=draw(st.integers(0, 99)),
    )
    return replace(case, dropped_share=draw(st.sampled_from([0.0, 0.3]))), lengths


@pytest.mark.parametrize("way", ["exact", "2 a node"])
@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases=st.lists(spread_cases(), min_size=8, max_size=8))
def test_any_table(ranks: Ranks, way: Way, cases: list[tuple[RoutedCase, list[int]]]) -> None:
    reports = ranks.run(4, spread, way, cases, torch.float64)
    for index, (case, lengths) in enumerate(cases):
        check(way, str(case), case, lengths, [report[index] for report in reports])


def test_eight_ranks_equal_one_rank(ranks: Ranks) -> None:
    case, lengths = RoutedCase(40, 16, 4), [3, 9, 0, 5, 8, 1, 7, 7]
    ways: tuple[Way, ...] = ("exact", "2 a node")
    for way in ways:
        reports = ranks.run(8, spread, way, [(case, lengths)], torch.float64)
        check(way, "eight", case, lengths, [report[0] for report in reports])


def test_one_rank_is_a_group_too(ranks: Ranks) -> None:
    case = RoutedCase(10, 4, 2)
    for way in ("exact", "1 a node"):
        ((report,),) = ranks.run(1, spread, way, [(case, [10])], torch.float64)
        expected = output_and_gradients(dense_loop, case, torch.float64)
        torch.testing.assert_close(report["parts"], expected)


def in_chunks(way: Way, case: RoutedCase, lengths: list[int], num_chunks: int) -> list[Tensor]:
    """Routes of several chunks made at once, all legs under way at once; rows are sent home as
    they are, and so every token comes back once for each rank that it went to."""
    rank = dist.get_rank()
    first = sum(lengths[:rank])
    mine = slice(first, first + lengths[rank])
    tokens, weights = (leaf[mine] for leaf in case.leaves(torch.float64)[:2])
    pieces = list(
        zip(
            tokens.tensor_split(num_chunks),
            weights.tensor_split(num_chunks),
            case.experts()[mine].tensor_split(num_chunks),
            strict=True,
        )
    )
    dispatcher = make_dispatcher(way)
    routes = dispatcher.make_routes(
        [routing_of(experts, w, num_experts=case.num_experts) for _, w, experts in pieces]
    )
    rows = [piece[0] for piece in pieces]
    for leg in range(len(routes[0].legs)):
        pending = [r.legs[leg].start(x) for r, x in zip(routes, rows, strict=True)]
        rows = [p.wait() for p in pending]
    for leg in reversed(range(len(routes[0].legs))):
        pending = [r.legs[leg].start_home(x) for r, x in zip(routes, rows, strict=True)]
        rows = [p.wait() for p in pending]
    return [torch.cat(rows), tokens, case.experts()[mine]]


@pytest.mark.parametrize("way", ["exact", "2 a node"])
def test_legs_of_several_chunks_run_at_once(ranks: Ranks, way: Way) -> None:
    case, lengths = RoutedCase(24, 8, 3, dropped_share=0.3), [1, 9, 0, 14]
    for home, tokens, experts in ranks.run(4, in_chunks, way, case, lengths, 3):
        num_ranks = [len({e // 2 for e in row if e < 8}) for row in experts.tolist()]
        wanted = tokens * torch.tensor(num_ranks, dtype=torch.float64)[:, None]
        torch.testing.assert_close(home, wanted)


def test_experts_that_cannot_be_shared_evenly_are_refused(ranks: Ranks) -> None:
    with pytest.raises(RankError, match="3 experts cannot be shared by 2 ranks"):
        ranks.run(2, spread, "exact", [(RoutedCase(4, 3, 1), [2, 2])], torch.float32)


def uneven_nodes() -> None:
    group = dist.group.WORLD
    assert group is not None
    make_node_groups(group, ranks_per_node=3)


def test_nodes_that_are_not_filled_are_refused(ranks: Ranks) -> None:
    with pytest.raises(RankError, match="4 ranks do not fill nodes of 3"):
        ranks.run(4, uneven_nodes)


@given(lengths=st.lists(st.integers(0, 4), max_size=6), width=st.integers(0, 4), seed=st.integers())
def test_segment_sum(lengths: list[int], width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed % 2**32)
    rows = torch.randn(9, width, dtype=torch.float64, generator=generator)
    chosen = torch.randint(9, (sum(lengths),), generator=generator)
    weights = torch.randn(sum(lengths), dtype=torch.float64, generator=generator)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    for factors in (None, weights):
        found = segment_sum(rows, chosen, starts, factors)
        weighted = rows[chosen] * (1.0 if factors is None else factors[:, None])
        parts = torch.split(weighted, lengths) if lengths else ()
        wanted = torch.stack([p.sum(0) for p in parts]) if parts else rows.new_zeros(0, width)
        torch.testing.assert_close(found, wanted)
