"""Experts spread evenly over the ranks of a group; a token goes once to each rank that has some.

Rank r of e has experts r E/e .. (r + 1) E/e. Of T tokens with K choices each

    rows sent out = number of different pairs (token, rank of a chosen expert)

which is the least there can be; as many come home, each the weighted sum over the experts of one
rank. With uniform routing a rank is hit with q = 1 - C(E - E/e, K) / C(E, K), so T (e - 1) q rows
cross, against T K (1 - 1/e) if every choice sent a row of its own.

Counts go ahead, so that each rank knows how much it will receive. No capacity, nothing dropped; a
rank may send or receive nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moe.dispatch.channel import Channel
from moe.dispatch.hooks import Hooks
from moe.dispatch.leg import make_leg
from moe.dispatch.payload import Wire
from moe.dispatch.route import Choices, Route, end_route, wanted_by
from moe.dispatch.trip import RouteTrip, travel
from moe.records import Routing


class ExactDispatcher:
    """For ranks of a group that share the experts evenly, in the order of their ranks.

    Attributes:
        channel: the group, and what was sent over it.
    """

    def __init__(self, group: dist.ProcessGroup, *, wire: Wire | None = None) -> None:
        """wire: how rows are written; by default as they are."""
        self.channel = Channel(group, wire or Wire())

    @property
    def channels(self) -> tuple[Channel, ...]:
        """One for each leg of a route, in their order."""
        return (self.channel,)

    def dispatch(self, tokens: Tensor, routing: Routing, hooks: Hooks) -> RouteTrip:
        """Every rank of the group calls this together, also with no tokens.

        Raises:
            ValueError: the experts cannot be shared evenly.
        """
        (route,) = self.make_routes([routing])
        return travel(tokens, routing.weights, route, hooks)

    def make_routes(self, routings: Sequence[Routing]) -> list[Route]:
        """One for each chunk of tokens, with one exchange of counts and one wait for all.

        Every rank of the group calls this together, with as many chunks; some may be empty.
        """
        size = self.channel.size
        num_local = share_evenly(routings[0].num_experts, size)
        wanted = [wanted_by(r.experts // num_local, num_destinations=size) for r in routings]
        # To each rank, of each chunk: its experts' rows, then the rows sent.
        counts = [r.counts.view(size, num_local) for r in routings]
        copies = [w.sum(dim=0)[:, None] for w in wanted]
        told = torch.stack(
            [torch.cat(both, dim=1) for both in zip(counts, copies, strict=True)], dim=1
        )
        one_each = (1,) * size
        heard = self.channel.start(told, one_each, one_each, "numbers").wait()
        local_counts = heard[..., :-1].sum(dim=0)
        sent, received, num_rows = host_numbers(
            told[..., -1].t(), heard[..., -1].t(), local_counts.sum(dim=1)[:, None]
        )
        legs = [
            make_leg(self.channel, w, send_splits=s, receive_splits=r)
            for w, s, r in zip(wanted, sent, received, strict=True)
        ]
        under_way = [
            leg.start(Choices(r.experts, r.weights).packed(), "numbers")
            for leg, r in zip(legs, routings, strict=True)
        ]
        first_expert = self.channel.group.rank() * num_local
        return [
            end_route(
                (legs[chunk],),
                Choices.unpacked(under_way[chunk].wait()),
                first_expert=first_expert,
                counts=local_counts[chunk],
                num_rows=num_rows[chunk][0],
            )
            for chunk in range(len(routings))
        ]


def share_evenly(num_experts: int, num_ranks: int) -> int:
    """Experts of each rank.

    Raises:
        ValueError: they cannot be shared evenly.
    """
    if num_experts % num_ranks:
        raise ValueError(f"{num_experts} experts cannot be shared by {num_ranks} ranks")
    return num_experts // num_ranks


def host_numbers(*tensors: Tensor) -> list[list[tuple[int, ...]]]:
    """The rows of each int64 [num_chunks, ...], with one wait for the device in all."""
    widths = [tensor.shape[1] for tensor in tensors]
    rows = torch.cat(tensors, dim=1).tolist()
    starts = [sum(widths[:index]) for index in range(len(widths))]
    return [
        [tuple(row[start : start + width]) for row in rows]
        for start, width in zip(starts, widths, strict=True)
    ]
