"""A user's hooks are called by every dispatcher and both executors, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe.dispatch.exact import ExactDispatcher
from moe.dispatch.hierarchical import HierarchicalDispatcher, make_node_groups
from moe.dispatch.hooks import HookMaker, Hooks, nested
from moe.dispatch.local import LocalDispatcher
from moe.records import Routing
from moe.reference import dense_loop
from moe.schedule.choose import Chunking
from moe.schedule.chunked import ChunkedExperts
from moe.schedule.lanes import ThreadLanes
from moe.schedule.serial import ExpertPath, SerialExperts
from tests.moe.routed_case import RoutedCase, output_and_gradients, routing_of
from tests.rank_pool import RankError, Ranks

CASE, LENGTHS = RoutedCase(24, 8, 3), [17, 7]


class _Watched(torch.autograd.Function):
    """Says when it is passed, and doubles gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, name: str, log: list[tuple[str, int]]) -> Tensor:
        log.append((name, len(rows)))
        ctx.name, ctx.log = name, log
        return rows.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.log.append((f"{ctx.name} backward", len(grad)))
        return 2.0 * grad, None, None


class Watching(Hooks):
    """Does something else at each place; linear where rows are sums over a rank's experts."""

    def __init__(self, log: list[tuple[str, int]]) -> None:
        self._log = log

    def _watched(self, rows: Tensor, name: str) -> Tensor:
        passed: Tensor = _Watched.apply(rows, name, self._log)  # type: ignore[no-untyped-call]
        return passed

    def before_dispatch(self, tokens: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
        return self._watched(tokens.sin(), "before_dispatch"), routing

    def after_dispatch(self, rows: Tensor) -> Tensor:
        return self._watched(rows.tanh(), "after_dispatch")

    def before_combine(self, answers: Tensor) -> Tensor:
        return self._watched(3.0 * answers, "before_combine")

    def after_combine(self, outputs: Tensor) -> Tensor:
        return self._watched(outputs**3, "after_combine")


def reference(tokens: Tensor, routing: Routing, fc1: Tensor, fc2: Tensor) -> Tensor:
    hooks = Watching([])
    sent = hooks.after_dispatch(hooks.before_dispatch(tokens, routing)[0])
    return hooks.after_combine(hooks.before_combine(dense_loop(sent, routing, fc1, fc2)))


def path_of(way: str, make_hooks: HookMaker) -> ExpertPath:
    group = dist.group.WORLD
    assert group is not None
    kind, _, chunks = way.partition(" in ")
    dispatcher: ExactDispatcher | HierarchicalDispatcher = ExactDispatcher(group)
    if kind == "hierarchical":
        dispatcher = HierarchicalDispatcher(make_node_groups(group, ranks_per_node=1))
    if not chunks:
        return SerialExperts(dispatcher, make_hooks)
    forward, backward = (Chunking.of(int(number)) for number in chunks.split("+"))
    return ChunkedExperts(dispatcher, ThreadLanes(), forward, backward, make_hooks)


def watched(way: str) -> tuple[list[Tensor], list[tuple[str, int]]]:
    """This rank's output and gradients, and the calls of the hooks."""
    rank, log = dist.get_rank(), list[tuple[str, int]]()
    mine = slice(sum(LENGTHS[:rank]), sum(LENGTHS[: rank + 1]))
    local = slice(rank * 4, (rank + 1) * 4)
    tokens, weights, fc1, fc2 = CASE.leaves(torch.float64)
    parts = (tokens[mine], weights[mine], fc1[local], fc2[local])
    leaves = [part.clone().requires_grad_() for part in parts]
    routing = routing_of(CASE.experts()[mine], leaves[1], num_experts=8)
    path = path_of(way, lambda: Watching(log))
    output = path(leaves[0], routing, leaves[2], leaves[3])
    grads = torch.autograd.grad(output, leaves, CASE.grad(torch.float64)[mine])
    return [output.detach(), *grads], log


@pytest.mark.parametrize("kind", ["exact", "hierarchical"])
@pytest.mark.parametrize("num_chunks", [0, 1, 3])
def test_hooks_are_called_in_order(ranks: Ranks, kind: str, num_chunks: int) -> None:
    way = f"{kind} in {num_chunks}+{num_chunks}" if num_chunks else kind
    reports = ranks.run(2, watched, way)
    expected = output_and_gradients(reference, CASE, torch.float64)
    for index, wanted in enumerate(expected):
        torch.testing.assert_close(torch.cat([parts[index] for parts, _ in reports]), wanted)
    at_experts = ["after_dispatch", "before_combine"] * max(num_chunks, 1)
    back = [f"{name} backward" for name in ["before_combine", "after_dispatch"]]
    for rank, (_, log) in enumerate(reports):
        assert [name for name, _ in log] == [
            "before_dispatch",
            *at_experts,
            "after_combine",
            "after_combine backward",
            *back * max(num_chunks, 1),
            "before_dispatch backward",
        ]
        # At home all tokens, at the experts each token once for this rank.
        is_wanted = (CASE.experts() // 4 == rank).any(dim=1)
        for name, total in (
            ("before_dispatch", LENGTHS[rank]),
            ("after_dispatch", int(is_wanted.sum())),
            ("before_combine backward", int(is_wanted.sum())),
            ("after_combine", LENGTHS[rank]),
        ):
            assert sum(rows for called, rows in log if called == name) == total, name


def test_where_nothing_travels() -> None:
    log = list[tuple[str, int]]()
    layer = SerialExperts(LocalDispatcher(), lambda: Watching(log))
    found = output_and_gradients(layer, CASE, torch.float64)
    torch.testing.assert_close(found, output_and_gradients(reference, CASE, torch.float64))
    names = ["before_dispatch", "after_dispatch", "before_combine", "after_combine"]
    assert [name for name, _ in log] == [*names, *(f"{name} backward" for name in names[::-1])]


def test_the_first_of_nested_hooks_is_next_to_the_layer() -> None:
    logs = list[tuple[str, int]](), list[tuple[str, int]]()
    calls: list[str] = []

    class Said(Watching):
        def __init__(self, number: int) -> None:
            super().__init__(logs[number])
            self._number = number

        def _watched(self, rows: Tensor, name: str) -> Tensor:
            calls.append(f"{name} {self._number}")
            return rows

    layer = SerialExperts(LocalDispatcher(), nested(lambda: Said(0), lambda: Said(1)))
    output_and_gradients(layer, CASE, torch.float64)
    assert calls == [
        *("before_dispatch 0", "before_dispatch 1", "after_dispatch 1", "after_dispatch 0"),
        *("before_combine 0", "before_combine 1", "after_combine 1", "after_combine 0"),
    ]


def test_backward_in_other_chunks_is_refused_where_hooks_act_at_the_experts(ranks: Ranks) -> None:
    with pytest.raises(RankError, match="2 chunks forward and 3 backward: hooks at the experts"):
        ranks.run(2, watched, "exact in 2+3")
