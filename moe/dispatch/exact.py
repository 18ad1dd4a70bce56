"""Experts spread evenly over the ranks of a group; every row goes to its expert as it is.

Rank r of e has experts r E/e .. (r + 1) E/e. Rows ordered by expert are therefore ordered by rank,
and one all-to-all with uneven splits moves them:

    here      rows by expert                        -> all-to-all ->
    there     rows by (sender, expert), reordered to (expert, sender) -> experts -> and back

Counts go ahead, so that each rank knows how much it will receive. No capacity, nothing dropped; a
rank may send or receive nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe.dispatch.all_to_all import all_to_all_rows, exchange_counts
from moe.permutation import Permutation, inverse, order_by_expert, permute, reorder, unpermute
from moe.records import Routing


@dataclass(frozen=True, slots=True)
class ExactTrip:
    """See `moe.dispatch.protocol.Trip`.

    Attributes:
        send_splits, receive_splits: rows to and from each rank, on the way to the experts.
        order: int64 [num_rows], place among the received rows of each of `rows`; `places` is its
            inverse.
    """

    rows: Tensor
    counts: Tensor
    weights: Tensor
    permutation: Permutation
    send_splits: list[int]
    receive_splits: list[int]
    order: Tensor
    places: Tensor
    group: dist.ProcessGroup

    def combine(self, outputs: Tensor) -> Tensor:
        by_sender = reorder(outputs, order=self.places, places=self.order)
        home = all_to_all_rows(
            by_sender,
            send_splits=self.receive_splits,
            receive_splits=self.send_splits,
            group=self.group,
        )
        return unpermute(home, self.weights, self.permutation)


@dataclass(frozen=True, slots=True)
class ExactDispatcher:
    """For ranks of a group that share the experts evenly, in the order of their ranks."""

    group: dist.ProcessGroup

    def dispatch(self, tokens: Tensor, routing: Routing) -> ExactTrip:
        """Every rank of the group calls this together, also with no tokens.

        Raises:
            ValueError: the experts cannot be shared evenly.
        """
        size = self.group.size()
        if routing.num_experts % size:
            raise ValueError(f"{routing.num_experts} experts cannot be shared by {size} ranks")
        received = exchange_counts(routing.counts, group=self.group)
        send_splits: list[int] = routing.counts.view(size, -1).sum(dim=1).tolist()
        receive_splits: list[int] = received.sum(dim=1).tolist()
        permutation = order_by_expert(routing.experts)
        rows = all_to_all_rows(
            permute(tokens, permutation),
            send_splits=send_splits,
            receive_splits=receive_splits,
            group=self.group,
        )
        order = _by_expert(received, num_rows=sum(receive_splits))
        places = inverse(order)
        return ExactTrip(
            rows=reorder(rows, order=order, places=places),
            counts=received.sum(dim=0),
            weights=routing.weights,
            permutation=permutation,
            send_splits=send_splits,
            receive_splits=receive_splits,
            order=order,
            places=places,
            group=self.group,
        )


def _by_expert(received: Tensor, *, num_rows: int) -> Tensor:
    """int64 [num_rows]: the received rows, which stand sender by sender, in order of expert.

    Args:
        received: int64 [num senders, num_local_experts], rows of each.
    """
    num_senders, num_experts = received.shape
    experts = torch.arange(num_experts, device=received.device).repeat(num_senders)
    of_row = experts.repeat_interleave(received.reshape(-1), output_size=num_rows)
    return of_row.argsort(stable=True)
