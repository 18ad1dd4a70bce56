"""A synchronous, differentiable trip over the legs of a route.

Out and home are each other's transposes, so each is the other's gradient. The gradient of the
weights, made where the answers are, travels home beside that of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe.dispatch.hooks import Hooks
from moe.dispatch.leg import Leg
from moe.dispatch.payload import Kind
from moe.dispatch.route import Route
from moe.permutation import permute, unpermute


@dataclass(frozen=True, slots=True)
class RouteTrip:
    """See `moe.dispatch.protocol.Trip`.

    Attributes:
        weights: `route.weights` with their gradient.
    """

    rows: Tensor
    weights: Tensor
    route: Route
    hooks: Hooks

    @property
    def counts(self) -> Tensor:
        return self.route.counts

    def combine(self, outputs: Tensor) -> Tensor:
        answers = unpermute(outputs, self.weights, self.route.permutation)
        answers = self.hooks.before_combine(answers)
        return _Home.apply(answers, self.route.legs)  # type: ignore[no-any-return, no-untyped-call]


def travel(tokens: Tensor, weights: Tensor, route: Route, hooks: Hooks) -> RouteTrip:
    """Take tokens [num_tokens, hidden_size] out; `weights` are those of their routing."""
    arrived, weights = _Out.apply(tokens, weights, route)  # type: ignore[no-untyped-call]
    arrived = hooks.after_dispatch(arrived)
    rows = permute(arrived, route.permutation)
    return RouteTrip(rows=rows, weights=weights, route=route, hooks=hooks)


class _Out(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weights: Tensor, route: Route) -> tuple[Tensor, Tensor]:
        ctx.route = route
        arrived_weights = route.weights.detach()
        if not ctx.needs_input_grad[1]:
            ctx.mark_non_differentiable(arrived_weights)
        return _go(tokens, route.legs, "rows"), arrived_weights

    @staticmethod
    def backward(
        ctx: Any, grad_rows: Tensor, grad_weights: Tensor
    ) -> tuple[Tensor, Tensor | None, None]:
        route: Route = ctx.route
        if not ctx.needs_input_grad[1]:
            return _go_home(grad_rows, route.legs, "gradients"), None, None
        numbers = route.grad_numbers(grad_weights)
        for leg in reversed(route.legs):
            rows_home = leg.start_home(grad_rows, "gradients")
            numbers_home = leg.start_home(numbers, "numbers")
            grad_rows, numbers = rows_home.wait(), numbers_home.wait()
        return grad_rows, numbers, None


class _Home(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, answers: Tensor, legs: Sequence[Leg]) -> Tensor:
        ctx.legs = legs
        return _go_home(answers, legs, "rows")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _go(grad, ctx.legs, "gradients"), None


def _go(rows: Tensor, legs: Sequence[Leg], kind: Kind) -> Tensor:
    for leg in legs:
        rows = leg.start(rows, kind).wait()
    return rows


def _go_home(rows: Tensor, legs: Sequence[Leg], kind: Kind) -> Tensor:
    for leg in reversed(legs):
        rows = leg.start_home(rows, kind).wait()
    return rows
