"""Compressed trips between ranks: buckets of each rank's own tokens, whoever has how many."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe.dispatch.compressed import Place
from moe.dispatch.exact import ExactDispatcher
from moe.dispatch.hierarchical import HierarchicalDispatcher, make_node_groups
from moe.dispatch.hooks import HookMaker
from moe.dispatch.payload import Payload, Wire
from moe.dispatch.per_expert import PerExpert
from moe.lsh.counters import CompressionCounters
from moe.schedule.choose import Chunking
from moe.schedule.chunked import ChunkedExperts
from moe.schedule.lanes import ThreadLanes
from moe.schedule.serial import ExpertPath, SerialExperts
from tests.moe.lsh.lsh_case import LshCase, singletons
from tests.moe.routed_case import RoutedCase, routing_of
from tests.rank_pool import RankError, Ranks

SPLITS = {
    "even": (RoutedCase(40, 8, 2), {2: [20, 20], 4: [10, 10, 10, 10]}),
    "uneven": (RoutedCase(40, 4, 3), {2: [33, 7], 4: [1, 19, 17, 3]}),
    "none on one rank": (RoutedCase(24, 8, 2), {2: [24, 0], 4: [10, 0, 4, 10]}),
    "all to one expert": (RoutedCase(24, 8, 1, choice="all to one"), {2: [9, 15], 4: [6, 6, 6, 6]}),
    "one token": (RoutedCase(1, 4, 2), {2: [0, 1], 4: [0, 0, 1, 0]}),
    "no token": (RoutedCase(0, 4, 2), {2: [0, 0], 4: [0, 0, 0, 0]}),
}


def sizes_sent(calls: list[tuple[Tensor, Any]]) -> int:
    """Bytes to other ranks of all-to-alls."""
    rank, size = dist.get_rank(), dist.get_world_size()
    total = 0
    for rows, splits in calls:
        parts = splits if splits is not None else [len(rows) // size] * size
        row_bytes = rows[:1].nbytes if len(rows) else 0
        total += sum(part for other, part in enumerate(parts) if other != rank) * row_bytes
    return total


def spread(
    case: LshCase,
    lengths: list[int],
    payload: Payload,
    is_exact: bool,
    cut: tuple[int, int] | None = None,
    ranks_per_node: int | None = None,
) -> dict[str, Any]:
    """This rank's part of the layer: its tokens and its experts; cut: chunks of each pass."""
    rank, size = dist.get_rank(), dist.get_world_size()
    routed, group = case.routed, dist.group.WORLD
    assert group is not None
    first = sum(lengths[:rank])
    mine = slice(first, first + lengths[rank])
    dtype = torch.float64 if payload == "none" else torch.float32
    tokens, weights, fc1, fc2 = routed.leaves(dtype)
    num_local = routed.num_experts // size
    local = slice(rank * num_local, (rank + 1) * num_local)
    leaves = [
        x.clone().requires_grad_() for x in (tokens[mine], weights[mine], fc1[local], fc2[local])
    ]
    routing = routing_of(routed.experts()[mine], leaves[1], num_experts=routed.num_experts)
    counters, calls = CompressionCounters(), []
    wire = Wire(payload, gradient_payload=payload)
    dispatcher: ExactDispatcher | HierarchicalDispatcher = ExactDispatcher(group, wire=wire)
    if ranks_per_node is not None:
        groups = make_node_groups(group, ranks_per_node=ranks_per_node)
        dispatcher = HierarchicalDispatcher(groups, wire=wire)
    make_hooks: HookMaker = PerExpert
    if not is_exact:
        first_leg = dispatcher.channels[0]
        place = Place(first_leg.group.rank(), first_leg.size)
        make_hooks = replace(case.compression(), payload=payload, place=place, counters=counters)
    layer: ExpertPath = SerialExperts(dispatcher, make_hooks)
    if cut is not None:
        forward, backward = map(Chunking.of, cut)
        layer = ChunkedExperts(dispatcher, ThreadLanes(), forward, backward, make_hooks)
    real = dist.all_to_all_single

    def watched(received: Tensor, rows: Tensor, **options: Any) -> Any:
        calls.append((rows, options.get("input_split_sizes")))
        return real(received, rows, **options)

    setattr(dist, "all_to_all_single", watched)  # noqa: B010
    try:
        output = layer(leaves[0], routing, leaves[2], leaves[3])
        sent_forward = sizes_sent(calls)
        grads = torch.autograd.grad(output, leaves, routed.grad(dtype)[mine])
    finally:
        setattr(dist, "all_to_all_single", real)  # noqa: B010
    return {
        "parts": [output.detach(), *grads],
        "report": counters.take(),
        "sent_forward": sent_forward,
        "sent_backward": sizes_sent(calls) - sent_forward,
        "num_calls": len(calls),
    }


def reference(case: LshCase, lengths: list[int]) -> list[Tensor]:
    """Output and gradients, the buckets of each rank apart; experts are the same for all."""
    leaves = [leaf.requires_grad_() for leaf in case.routed.leaves(torch.float64)]
    outputs = []
    for rank, length in enumerate(lengths):
        first = sum(lengths[:rank])
        mine = slice(first, first + length)
        routing = routing_of(
            case.routed.experts()[mine], leaves[1][mine], num_experts=case.routed.num_experts
        )
        outputs.append(case.reference(leaves[0][mine], routing, leaves[2], leaves[3]))
    output = torch.cat(outputs)
    grads = torch.autograd.grad(
        output, leaves, case.routed.grad(torch.float64), allow_unused=True, materialize_grads=True
    )
    return [output.detach(), *grads]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", SPLITS)
def test_ranks_equal_the_reference(ranks: Ranks, name: str, world_size: int) -> None:
    routed, splits = SPLITS[name]
    case, lengths = LshCase(routed), splits[world_size]
    reports = ranks.run(world_size, spread, case, lengths, "none", False)
    expected = reference(case, lengths)
    names = ("output", "gradient of tokens", "of weights", "of linear_fc1", "of linear_fc2")
    for index, part in enumerate(names):
        found = torch.cat([report["parts"][index] for report in reports])
        torch.testing.assert_close(found, expected[index], msg=f"{name}, {world_size}: {part}")
    if routed.num_tokens > 20:
        assert sum(r["report"].num_sent for r in reports) < routed.num_tokens * routed.topk
    # Counts, the experts' numbers, centroids and answers; backward the gradients of both.
    assert {report["num_calls"] for report in reports} == {6}


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", SPLITS)
def test_every_token_its_own_bucket_is_the_exact_trip_bit_by_bit(
    ranks: Ranks, name: str, world_size: int
) -> None:
    routed, splits = SPLITS[name]
    lengths = splits[world_size]
    found, wanted = (
        ranks.run(world_size, spread, singletons(routed), lengths, "none", is_exact)
        for is_exact in (False, True)
    )
    for mine, exact in zip(found, wanted, strict=True):
        assert all(map(torch.equal, mine["parts"], exact["parts"]))


@pytest.mark.parametrize("payload", ["none", "int8", "float8_e4m3fn"])
def test_bytes_on_the_wire_are_counted(ranks: Ranks, payload: Payload) -> None:
    """Watched at the collectives; summed over ranks, for answers are sent by their givers. Rows
    are counted; ahead of them go two numbers a row, and once counts."""
    case, lengths = LshCase(SPLITS["uneven"][0]), [33, 7]
    reports = ranks.run(2, spread, case, lengths, payload, False)
    counted = sum(report["report"].num_bytes for report in reports)
    assert counted == sum(report["sent_backward"] for report in reports)
    row_bytes = {"none": 8 * 8, "int8": 8 + 4, "float8_e4m3fn": 8 + 4}[payload]
    itemsize = 8 if payload == "none" else 4
    num_rows, rest = divmod(counted, 2 * row_bytes)
    assert rest == 0
    # To each of two ranks: rows of each of its two experts, and rows sent.
    ahead = num_rows * 2 * itemsize + 2 * 8 * (2 + 1)
    assert counted + ahead == sum(report["sent_forward"] for report in reports)
    # Each token of 40 is wanted by the other rank or not, there and back.
    experts = case.routed.experts()
    wanted = [(experts[:33] >= 2).any(1).sum(), (experts[33:] < 2).any(1).sum()]
    exact = 2 * 8 * itemsize * int(sum(wanted))
    assert sum(report["report"].num_exact_bytes for report in reports) == exact


@pytest.mark.parametrize("payload", ["int8", "float8_e4m3fn"])
def test_rounding_on_the_wire_is_rounding_at_home(ranks: Ranks, payload: Payload) -> None:
    """All tokens on one rank: what travels to another is rounded as what stays."""
    case = LshCase(RoutedCase(30, 4, 2))
    (alone,) = ranks.run(1, spread, case, [30], payload, False)
    reports = ranks.run(2, spread, case, [30, 0], payload, False)
    found = [torch.cat([r["parts"][index] for r in reports]) for index in range(5)]
    torch.testing.assert_close(found, alone["parts"], rtol=1e-5, atol=1e-5)
    (exact,) = ranks.run(1, spread, case, [30], "none", False)
    assert float((found[0] - exact["parts"][0]).abs().max()) > 1e-4


CUTS = [(1, 1), (3, 3), (2, 5)]


@pytest.mark.parametrize("name", ["uneven", "none on one rank", "one token"])
def test_chunks_change_nothing(ranks: Ranks, name: str) -> None:
    """Buckets are of the whole micro-batch, so the reference is that of the uncut trip."""
    routed, splits = SPLITS[name]
    case, lengths = LshCase(routed), splits[2]
    expected = reference(case, lengths)
    for cut in CUTS:
        reports = ranks.run(2, spread, case, lengths, "none", False, cut)
        for index, wanted in enumerate(expected):
            found = torch.cat([report["parts"][index] for report in reports])
            torch.testing.assert_close(found, wanted, msg=f"{name}, {cut}: part {index}")


def test_chunks_of_8_bit_rows_are_rounded_alike(ranks: Ranks) -> None:
    case, lengths = LshCase(SPLITS["uneven"][0]), [33, 7]
    whole = ranks.run(2, spread, case, lengths, "int8", False)
    chunked = ranks.run(2, spread, case, lengths, "int8", False, (3, 3))
    for uncut, found in zip(whole, chunked, strict=True):
        # A product that rounds otherwise in float32 may round to another of 254 steps.
        for value, wanted in zip(found["parts"], uncut["parts"], strict=True):
            torch.testing.assert_close(value, wanted, rtol=0.02, atol=0.02)
        assert found["report"] == uncut["report"]


def test_chunks_of_single_tokens_are_the_exact_trip_in_chunks_bit_by_bit(ranks: Ranks) -> None:
    routed, splits = SPLITS["uneven"]
    found, wanted = (
        ranks.run(2, spread, singletons(routed), splits[2], "none", is_exact, (3, 2))
        for is_exact in (False, True)
    )
    for mine, exact in zip(found, wanted, strict=True):
        assert all(map(torch.equal, mine["parts"], exact["parts"]))


@pytest.mark.parametrize("cut", [None, (3, 3)])
def test_over_nodes(ranks: Ranks, cut: tuple[int, int] | None) -> None:
    """Two nodes of two ranks; rows that are counted are those between nodes."""
    routed, splits = SPLITS["uneven"]
    case, lengths = LshCase(routed), splits[4]
    reports = ranks.run(4, spread, case, lengths, "none", False, cut, 2)
    for index, wanted in enumerate(reference(case, lengths)):
        found = torch.cat([report["parts"][index] for report in reports])
        torch.testing.assert_close(found, wanted)
    direct = ranks.run(4, spread, case, lengths, "none", False)
    sent = [sum(r["report"].num_bytes for r in found) for found in (reports, direct)]
    assert 0 < sent[0] < sent[1]


def test_experts_that_cannot_be_shared_evenly_are_refused(ranks: Ranks) -> None:
    with pytest.raises(RankError, match="3 experts cannot be shared by 2 ranks"):
        ranks.run(2, spread, LshCase(RoutedCase(4, 3, 1)), [2, 2], "none", False)
