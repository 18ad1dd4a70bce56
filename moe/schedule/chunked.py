"""An expert layer whose tokens travel in chunks, while others are computed (FSMoE, 2501.10714).

    forward, chunk c     legs out -> experts -> legs home
    backward, chunk c    the same legs with gradients; after the last chunk's, while gradients are
                         still going home, the gradients of the weights of all chunks at once

Forward and backward have their own numbers of chunks. Result and gradients are those of the uncut
layer: how many rows meet an expert at a time changes nothing but the rounding of products. All that
ranks do together follows from the two `Chunking`s and the number of legs, never from a clock or a
number of tokens; a rank without tokens sends empty chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moe.dispatch.channel import Kind
from moe.dispatch.leg import Leg
from moe.dispatch.route import Route
from moe.records import Routing
from moe.schedule.choose import Chunking
from moe.schedule.chunks import cut, cut_routing
from moe.schedule.expert_steps import (
    Kept,
    WeightGradParts,
    backward_step,
    forward_step,
    weight_gradients,
)
from moe.schedule.lanes import Function, Lanes, Rows, Step
from moe.schedule.regroup import regroup
from moe.schedule.simulate import StreamName, issue_order


def streams_of(num_legs: int) -> tuple[StreamName, ...]:
    """Of the legs out: the first crosses between nodes, a second one stays inside."""
    streams: tuple[StreamName, ...] = ("inter", "intra")
    return streams[:num_legs]


class RouteMaker(Protocol):
    """A dispatcher whose trips are legs (`moe.dispatch.exact`, `moe.dispatch.hierarchical`)."""

    def make_routes(self, routings: Sequence[Routing]) -> list[Route]:
        """One for each chunk; all ranks of the group call this together, with as many."""
        ...


@dataclass(frozen=True, slots=True)
class ChunkedExperts:
    """Dispatch, experts and combine of one layer.

    Attributes:
        forward, backward: the same on all ranks of the group.
    """

    dispatcher: RouteMaker
    lanes: Lanes
    forward: Chunking
    backward: Chunking

    def __call__(
        self, tokens: Tensor, routing: Routing, linear_fc1: Tensor, linear_fc2: Tensor
    ) -> Tensor:
        """The routed output [num_tokens, hidden_size]; every rank of the group calls this together.

        Args:
            tokens: [num_tokens, hidden_size]; none is fine.
            linear_fc1: [num_local_experts, 2 * ffn_size, hidden_size], gate first.
            linear_fc2: [num_local_experts, hidden_size, ffn_size].
        """
        output: Tensor = _Layer.apply(  # type: ignore[no-untyped-call]
            tokens, routing.weights, linear_fc1, linear_fc2, routing, self
        )
        return output


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weights: Tensor,
        linear_fc1: Tensor,
        linear_fc2: Tensor,
        routing: Routing,
        layer: ChunkedExperts,
    ) -> Tensor:
        chunking = layer.forward
        routes = layer.dispatcher.make_routes(cut_routing(routing, chunking.num_chunks))
        kept: list[Kept] = []
        is_kept = any(ctx.needs_input_grad)

        def experts(chunk: int, rows: Rows) -> Rows:
            (arrived,) = rows
            answers, gate_up = forward_step(arrived, routes[chunk], linear_fc1, linear_fc2)
            if is_kept:
                kept.append(Kept(arrived, gate_up))
            return (answers,)

        homes = _run(layer.lanes, chunking, routes, tokens, experts)
        ctx.layer, ctx.routing, ctx.routes = layer, routing, routes
        saved = [tensor for chunk in kept for tensor in (chunk.arrived, chunk.gate_up)]
        ctx.save_for_backward(linear_fc1, linear_fc2, *saved)
        return _joined([home for (home,) in homes])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layer: ChunkedExperts = ctx.layer
        linear_fc1, linear_fc2, *saved = ctx.saved_tensors
        kept = [Kept(*pair) for pair in zip(saved[::2], saved[1::2], strict=True)]
        routes: list[Route] = ctx.routes
        chunking = layer.backward
        if chunking.num_chunks != layer.forward.num_chunks:
            # Who wants what is told again, chunk by chunk as it goes now.
            wanted = layer.dispatcher.make_routes(cut_routing(ctx.routing, chunking.num_chunks))
            kept = regroup(kept, routes, wanted, num_tokens=grad.shape[0])
            routes = wanted
        parts: list[WeightGradParts] = []
        grads_of_weights: list[Tensor] = []

        def experts(chunk: int, rows: Rows) -> Rows:
            route = routes[chunk]
            grad_arrived, grad_weights, part = backward_step(
                rows[0], kept[chunk], route, linear_fc1, linear_fc2
            )
            parts.append(part)
            return grad_arrived, route.grad_numbers(grad_weights)

        def weights() -> None:
            grads_of_weights.extend(weight_gradients(parts, linear_fc1, linear_fc2))

        homes = _run(layer.lanes, chunking, routes, grad, experts, afterwards=weights)
        grad_tokens = _joined([home for home, _ in homes])
        grad_weights = _joined([numbers for _, numbers in homes])
        return grad_tokens, grad_weights, *grads_of_weights, None, None


def _run(
    lanes: Lanes,
    chunking: Chunking,
    routes: Sequence[Route],
    tokens: Tensor,
    experts: Function,
    *,
    afterwards: Callable[[], None] | None = None,
) -> list[Rows]:
    """Every chunk of `tokens` out, to the experts and home."""
    parts = [tokens.detach()[part] for part in cut(tokens.shape[0], chunking.num_chunks)]
    streams = streams_of(len(routes[0].legs))
    steps = [Step(stream, _out(routes, leg, parts)) for leg, stream in enumerate(streams)]
    steps.append(Step("compute", experts))
    steps += [Step(stream, _home(routes, leg)) for leg, stream in reversed([*enumerate(streams)])]
    order = issue_order(chunking.num_chunks, len(steps), lag=chunking.lag)
    return lanes.run(order, steps, chunking.num_chunks, afterwards=afterwards)


def _out(routes: Sequence[Route], leg: int, parts: Sequence[Tensor]) -> Function:
    def step(chunk: int, rows: Rows) -> Rows:
        before = rows[0] if leg else parts[chunk]
        return (routes[chunk].legs[leg].start(before).wait(),)

    return step


def _home(routes: Sequence[Route], leg: int) -> Function:
    def step(chunk: int, rows: Rows) -> Rows:
        own: Leg = routes[chunk].legs[leg]
        kinds: tuple[Kind, ...] = ("rows", "numbers")
        under_way = [own.start_home(tensor, kind) for tensor, kind in zip(rows, kinds)]  # noqa: B905
        return tuple(pending.wait() for pending in under_way)

    return step


def _joined(chunks: list[Tensor]) -> Tensor:
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks)
