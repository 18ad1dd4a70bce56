"""Rows sorted by expert travel to the ranks of their experts and back, each for itself.

Rank r of e has experts r E/e .. (r + 1) E/e, so rows by expert are rows by rank:

    here      rows by expert                        -> all-to-all ->
    there     rows by (sender, expert), reordered to (expert, sender) -> experts -> and back

What travels for an expert is not what travels for another one, as it is where rows are means of
different tokens for each. A token that goes to several experts of one rank goes there several
times. Without a group all experts are here and nothing moves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe.dispatch.all_to_all import all_to_all_rows, exchange_counts
from moe.dispatch.payload import Payload, pack_rows, rounded_rows, row_bytes, unpack_rows
from moe.permutation import Permutation, inverse, order_by_expert, permute, reorder, unpermute
from moe.records import Routing


@dataclass(frozen=True, slots=True)
class ExpertRoute:
    """Where rows go; the same for all that travel between these rows' senders and experts.

    Attributes:
        counts: int64 [num_local_experts], rows that arrive for each.
        send_splits, receive_splits: rows to and from each rank, on the way to the experts.
        order: int64 [rows that arrive], place among them, as they come, of each row sorted by
            expert; `places` is its inverse. None where nothing moves.
    """

    counts: Tensor
    send_splits: list[int]
    receive_splits: list[int]
    order: Tensor | None = None
    places: Tensor | None = None
    group: dist.ProcessGroup | None = None

    @property
    def num_sent(self) -> int:
        return sum(self.send_splits)

    @property
    def num_crossing(self) -> int:
        """Rows sent to other ranks."""
        if self.group is None:
            return 0
        return self.num_sent - self.send_splits[self.group.rank()]

    def there(self, rows: Tensor, wire: Wire) -> Tensor:
        """Rows sorted by expert to those of this rank's experts, sorted by expert."""
        if self.group is None or self.order is None or self.places is None:
            return wire.carry(rows, self.send_splits, self.receive_splits, None)
        arrived = wire.carry(rows, self.send_splits, self.receive_splits, self.group)
        return reorder(arrived, order=self.order, places=self.places)

    def back(self, rows: Tensor, wire: Wire) -> Tensor:
        """The way back of `there`."""
        if self.group is None or self.order is None or self.places is None:
            return wire.carry(rows, self.receive_splits, self.send_splits, None)
        by_sender = reorder(rows, order=self.places, places=self.order)
        return wire.carry(by_sender, self.receive_splits, self.send_splits, self.group)


@dataclass(frozen=True, slots=True)
class Wire:
    """How rows are written on the wire.

    Attributes:
        payload: of rows on their way.
        gradient_payload: of the gradients on theirs.
    """

    payload: Payload = "none"
    gradient_payload: Payload = "none"

    def carry(
        self,
        rows: Tensor,
        send_splits: list[int],
        receive_splits: list[int],
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """All-to-all of rows (see `moe.dispatch.all_to_all`); without a group only the rounding."""
        if self.payload == self.gradient_payload == "none":
            if group is None:
                return rows
            return all_to_all_rows(
                rows, send_splits=send_splits, receive_splits=receive_splits, group=group
            )
        return _Carry.apply(rows, self, send_splits, receive_splits, group)  # type: ignore[no-any-return, no-untyped-call]

    def num_bytes(self, rows: int, hidden_size: int, dtype: torch.dtype) -> int:
        """Bytes of so many rows one way, forward."""
        return rows * row_bytes(hidden_size, payload=self.payload, dtype=dtype)


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        wire: Wire,
        send_splits: list[int],
        receive_splits: list[int],
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.wire, ctx.splits, ctx.group = wire, (send_splits, receive_splits), group
        return _carried(rows, wire.payload, send_splits, receive_splits, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        # The gradient of rounding is taken as that of the identity.
        send_splits, receive_splits = ctx.splits
        payload = ctx.wire.gradient_payload
        home = _carried(grad, payload, receive_splits, send_splits, ctx.group)
        return home, None, None, None, None


def _carried(
    rows: Tensor,
    payload: Payload,
    send_splits: list[int],
    receive_splits: list[int],
    group: dist.ProcessGroup | None,
) -> Tensor:
    if group is None:
        return rounded_rows(rows, payload=payload).view_as(rows)
    packed = rows if payload == "none" else pack_rows(rows, payload=payload)
    arrived = all_to_all_rows(
        packed, send_splits=send_splits, receive_splits=receive_splits, group=group
    )
    if payload == "none":
        return arrived
    return unpack_rows(arrived, payload=payload, dtype=rows.dtype)


def make_route(counts: Tensor, *, group: dist.ProcessGroup | None) -> ExpertRoute:
    """Agree on how many rows go where; every rank of the group calls this together.

    Args:
        counts: int64 [num_experts], this rank's rows for each expert of the group.

    Raises:
        ValueError: the experts cannot be shared evenly.
    """
    if group is None or group.size() == 1:
        num_rows = int(counts.sum())
        return ExpertRoute(counts=counts, send_splits=[num_rows], receive_splits=[num_rows])
    size, num_experts = group.size(), counts.shape[0]
    if num_experts % size:
        raise ValueError(f"{num_experts} experts cannot be shared by {size} ranks")
    received = exchange_counts(counts, group=group)
    # One wait for the device brings both.
    sums = torch.stack([counts.view(size, -1).sum(dim=1), received.sum(dim=1)]).tolist()
    order = _by_expert(received, num_rows=sum(sums[1]))
    return ExpertRoute(
        counts=received.sum(dim=0),
        send_splits=sums[0],
        receive_splits=sums[1],
        order=order,
        places=inverse(order),
        group=group,
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


@dataclass(frozen=True, slots=True)
class PerExpertTrip:
    """See `moe.dispatch.protocol.Trip`."""

    rows: Tensor
    route: ExpertRoute
    weights: Tensor
    permutation: Permutation
    wire: Wire

    @property
    def counts(self) -> Tensor:
        return self.route.counts

    def combine(self, outputs: Tensor) -> Tensor:
        home = self.route.back(outputs, self.wire)
        return unpermute(home, self.weights, self.permutation)


@dataclass(frozen=True, slots=True)
class PerExpertDispatcher:
    """A row for each token and expert; what compression is compared with.

    Attributes:
        group: ranks that share the experts evenly, in the order of their ranks; None: all are here.
    """

    group: dist.ProcessGroup | None = None
    wire: Wire = field(default_factory=Wire)

    def dispatch(self, tokens: Tensor, routing: Routing) -> PerExpertTrip:
        """Every rank of the group calls this together, also with no tokens."""
        route = make_route(routing.counts, group=self.group)
        permutation = order_by_expert(routing.experts, num_rows=route.num_sent)
        rows = route.there(permute(tokens, permutation), self.wire)
        return PerExpertTrip(rows, route, routing.weights, permutation, self.wire)
