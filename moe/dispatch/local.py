"""All experts are here: nothing travels, rows are only put in order."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe.dispatch.hooks import Hooks
from moe.permutation import Permutation, order_by_expert, permute, unpermute
from moe.records import Routing


@dataclass(frozen=True, slots=True)
class LocalTrip:
    """See `moe.dispatch.protocol.Trip`."""

    rows: Tensor
    counts: Tensor
    weights: Tensor
    permutation: Permutation
    hooks: Hooks

    def combine(self, outputs: Tensor) -> Tensor:
        answers = unpermute(outputs, self.weights, self.permutation)
        return self.hooks.before_combine(answers)


@dataclass(frozen=True, slots=True)
class LocalDispatcher:
    """For a rank that has every expert."""

    def dispatch(self, tokens: Tensor, routing: Routing, hooks: Hooks) -> LocalTrip:
        permutation = order_by_expert(routing.experts, num_rows=routing.num_rows())
        return LocalTrip(
            rows=permute(hooks.after_dispatch(tokens), permutation),
            counts=routing.counts,
            weights=routing.weights,
            permutation=permutation,
            hooks=hooks,
        )
