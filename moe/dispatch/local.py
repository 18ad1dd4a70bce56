"""All experts are here: nothing travels, rows are only put in order."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe.permutation import Permutation, order_by_expert, permute, unpermute
from moe.records import Routing


@dataclass(frozen=True, slots=True)
class LocalTrip:
    """See `moe.dispatch.protocol.Trip`."""

    rows: Tensor
    counts: Tensor
    weights: Tensor
    permutation: Permutation

    def combine(self, outputs: Tensor) -> Tensor:
        return unpermute(outputs, self.weights, self.permutation)


@dataclass(frozen=True, slots=True)
class LocalDispatcher:
    """For a rank that has every expert."""

    def dispatch(self, tokens: Tensor, routing: Routing) -> LocalTrip:
        permutation = order_by_expert(routing.experts, num_rows=routing.num_rows())
        return LocalTrip(
            rows=permute(tokens, permutation),
            counts=routing.counts,
            weights=routing.weights,
            permutation=permutation,
        )
