"""Where one batch of tokens goes: legs, and what is known where they end.

Which experts a token wants and with which weights travels ahead of it over the same legs, as a few
numbers a row. Where the last leg ends, each row then becomes one row for each expert there that it
wants, the experts' answers are summed with their weights in float32, and one row goes home:

    rows -> legs -> permute -> experts -> unpermute(weights) -> legs home -> tokens

A route only says so. Acting on it is for `moe.dispatch.trip`, or for a scheduler that has several
chunks under way. The gradient of a weight is a dot product made where the answer is, and goes home
as a number over the legs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.dispatch.leg import Leg
from moe.permutation import Permutation, order_by_expert


@dataclass(frozen=True, slots=True)
class Choices:
    """Which experts rows want; weights carry no gradient here.

    Attributes:
        experts: int64 [num_rows, topk], global numbers; others than exist are nowhere.
        weights: [num_rows, topk].
    """

    experts: Tensor
    weights: Tensor

    def packed(self) -> Tensor:
        """[num_rows, 2 * topk] in the dtype of the weights, which holds every number exactly."""
        return torch.cat((self.experts.to(self.weights.dtype), self.weights.detach()), dim=1)

    @classmethod
    def unpacked(cls, numbers: Tensor) -> Choices:
        experts, weights = numbers.chunk(2, dim=1)
        return cls(experts=experts.to(torch.int64), weights=weights)


@dataclass(frozen=True, slots=True)
class Route:
    """From this rank's tokens to its experts.

    Attributes:
        legs: on the way out, in this order; home in the opposite one.
        permutation: of the rows that arrive, to rows expert by expert.
        counts: int64 [num_local_experts], rows of each.
        weights: float32 [num arrived, width], of what is wanted here; no gradient.
        columns: int64 [num arrived, width], which of a token's choices these are; None: all.
        topk: choices of a token.
    """

    legs: tuple[Leg, ...]
    permutation: Permutation
    counts: Tensor
    weights: Tensor
    columns: Tensor | None
    topk: int

    def grad_numbers(self, grad_weights: Tensor) -> Tensor:
        """[num arrived, topk] of the gradient of `weights`: what `start_home` brings home with
        kind "numbers". The sums that arrive are the gradient of `Routing.weights`."""
        if self.columns is None:
            return grad_weights
        numbers = grad_weights.new_zeros(grad_weights.shape[0], self.topk)
        return numbers.scatter_(1, self.columns, grad_weights)


def end_route(
    legs: tuple[Leg, ...], arrived: Choices, *, first_expert: int, counts: Tensor, num_rows: int
) -> Route:
    """The route, once its choices have arrived.

    Args:
        first_expert: global number of this rank's first one.
        counts: see `Route`; they sum to num_rows, which the host knows.
    """
    num_local, topk = counts.numel(), arrived.experts.shape[1]
    local = arrived.experts - first_expert
    local = local.masked_fill((local < 0) | (local >= num_local), num_local)
    weights, columns = arrived.weights, None
    if num_local < topk:
        # At most so many of a row's choices are here: the rest need not be looked through.
        local, columns = local.sort(dim=1, stable=True)
        local, columns = local[:, :num_local], columns[:, :num_local]
        weights = weights.gather(1, columns)
    return Route(
        legs=legs,
        permutation=order_by_expert(local, num_rows=num_rows),
        counts=counts,
        weights=weights,
        columns=columns,
        topk=topk,
    )


def wanted_by(destinations: Tensor, *, num_destinations: int) -> Tensor:
    """bool [num_rows, num_destinations]: whether a row wants anything there.

    Args:
        destinations: int64 [num_rows, topk]; numbers that do not exist are nowhere.
    """
    is_nowhere = (destinations < 0) | (destinations >= num_destinations)
    slots = destinations.masked_fill(is_nowhere, num_destinations)
    wanted = slots.new_zeros(slots.shape[0], num_destinations + 1, dtype=torch.bool)
    return wanted.scatter_(1, slots, True)[:, :num_destinations]
