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

from moe.dispatch.hooks import HookMaker, Hooks, Recorded, record
from moe.dispatch.leg import Leg
from moe.dispatch.payload import Kind
from moe.dispatch.route import Route
from moe.records import Routing
from moe.schedule.choose import Chunking
from moe.schedule.chunks import cut, cut_routing, join
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


class Gaps(Protocol):
    """Who else wants the links between nodes, and is told when they are free; backward only."""

    def between(self) -> None:
        """All chunks are out, and none can be on its way home yet."""
        ...

    def after(self) -> None:
        """All are home."""
        ...


@dataclass(frozen=True, slots=True)
class ChunkedExperts:
    """See `moe.schedule.serial.ExpertPath`.

    Attributes:
        forward, backward: the same on all ranks of the group.
        make_hooks: those at home see all tokens, those at the experts one chunk at a time.
    """

    dispatcher: RouteMaker
    lanes: Lanes
    forward: Chunking
    backward: Chunking
    make_hooks: HookMaker = Hooks
    gaps: Gaps | None = None

    def __call__(
        self, tokens: Tensor, routing: Routing, linear_fc1: Tensor, linear_fc2: Tensor
    ) -> Tensor:
        """See `ExpertPath`.

        Raises:
            ValueError: hooks at the experts do something, and backward is cut otherwise.
        """
        hooks = self.make_hooks()
        sent, routing = hooks.before_dispatch(tokens, routing)
        output: Tensor = _Layer.apply(  # type: ignore[no-untyped-call]
            sent, routing.weights, linear_fc1, linear_fc2, routing, self, hooks
        )
        return hooks.after_combine(output)


@dataclass(frozen=True, slots=True)
class _Hooked:
    """What the hooks at the experts did to one chunk."""

    arrived: Recorded
    answers: Recorded

    @property
    def does_nothing(self) -> bool:
        return self.arrived.does_nothing and self.answers.does_nothing


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
        hooks: Hooks,
    ) -> Tensor:
        chunking = layer.forward
        routes = layer.dispatcher.make_routes(cut_routing(routing, chunking.num_chunks))
        kept: list[Kept] = []
        hooked: list[_Hooked] = []
        is_kept = any(ctx.needs_input_grad)

        def experts(chunk: int, rows: Rows) -> Rows:
            arrived = record(hooks.after_dispatch, rows[0])
            given = arrived.made.detach()
            answers, gate_up = forward_step(given, routes[chunk], linear_fc1, linear_fc2)
            sent = record(hooks.before_combine, answers)
            if is_kept:
                kept.append(Kept(given, gate_up))
                hooked.append(_Hooked(arrived, sent))
            return (sent.made.detach(),)

        homes = _run(layer.lanes, chunking, routes, tokens, experts, kind="rows")
        ctx.layer, ctx.routing, ctx.routes = layer, routing, routes
        ctx.hooked = None if all(chunk.does_nothing for chunk in hooked) else hooked
        if ctx.hooked and layer.backward.num_chunks != chunking.num_chunks:
            raise ValueError(
                f"{chunking.num_chunks} chunks forward and {layer.backward.num_chunks} backward: "
                "hooks at the experts need as many"
            )
        saved = [tensor for chunk in kept for tensor in (chunk.arrived, chunk.gate_up)]
        ctx.save_for_backward(linear_fc1, linear_fc2, *saved)
        return join([home for (home,) in homes], tokens.shape[0])

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
        hooked: list[_Hooked] | None = ctx.hooked
        needs_weights = ctx.needs_input_grad[1]

        def experts(chunk: int, rows: Rows) -> Rows:
            route, (grad_answers,) = routes[chunk], rows
            if hooked:
                grad_answers = hooked[chunk].answers.backward(grad_answers)
            grad_arrived, grad_weights, part = backward_step(
                grad_answers, kept[chunk], route, linear_fc1, linear_fc2
            )
            parts.append(part)
            if hooked:
                grad_arrived = hooked[chunk].arrived.backward(grad_arrived)
            if not needs_weights:
                return (grad_arrived,)
            return grad_arrived, route.grad_numbers(grad_weights)

        def weights() -> None:
            grads_of_weights.extend(weight_gradients(parts, linear_fc1, linear_fc2))

        homes = _run(
            layer.lanes,
            chunking,
            routes,
            grad,
            experts,
            kind="gradients",
            afterwards=weights,
            gaps=layer.gaps,
        )
        num_tokens = grad.shape[0]
        grad_tokens = join([home[0] for home in homes], num_tokens)
        grad_weights = join([home[1] for home in homes], num_tokens) if needs_weights else None
        return grad_tokens, grad_weights, *grads_of_weights, None, None, None


def _run(
    lanes: Lanes,
    chunking: Chunking,
    routes: Sequence[Route],
    tokens: Tensor,
    experts: Function,
    *,
    kind: Kind,
    afterwards: Callable[[], None] | None = None,
    gaps: Gaps | None = None,
) -> list[Rows]:
    """Every chunk of `tokens` out, to the experts and home.

    Args:
        kind: of what travels.
    """
    parts = [tokens.detach()[part] for part in cut(tokens.shape[0], chunking.num_chunks)]
    streams = streams_of(len(routes[0].legs))
    steps = [
        Step(stream, _out(routes, leg, parts, kind, gaps)) for leg, stream in enumerate(streams)
    ]
    steps.append(Step("compute", experts))
    for leg, stream in reversed([*enumerate(streams)]):
        steps.append(Step(stream, _home(routes, leg, kind)))
    order = issue_order(chunking.num_chunks, len(steps), lag=chunking.lag)
    homes = lanes.run(order, steps, chunking.num_chunks, afterwards=afterwards)
    if gaps is not None:
        gaps.after()
    return homes


def _out(
    routes: Sequence[Route], leg: int, parts: Sequence[Tensor], kind: Kind, gaps: Gaps | None
) -> Function:
    def step(chunk: int, rows: Rows) -> Rows:
        before = rows[0] if leg else parts[chunk]
        arrived = routes[chunk].legs[leg].start(before, kind).wait()
        if gaps is not None and leg == 0 and chunk == len(parts) - 1:
            gaps.between()
        return (arrived,)

    return step


def _home(routes: Sequence[Route], leg: int, kind: Kind) -> Function:
    def step(chunk: int, rows: Rows) -> Rows:
        own: Leg = routes[chunk].legs[leg]
        kinds: tuple[Kind, ...] = (kind, "numbers")
        under_way = [own.start_home(tensor, kind) for tensor, kind in zip(rows, kinds)]  # noqa: B905
        return tuple(pending.wait() for pending in under_way)

    return step
