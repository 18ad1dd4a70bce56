"""One leg of a token's way to its experts: a gather, then an all-to-all in one group.

With S the 0/1 matrix that names for each sent row the row it copies, and P the all-to-all (which
only moves rows, so that its inverse is its transpose):

    out    received = P S rows            start
    home   answers  = S^T P^T received    start_home: what copies of one row brought is added up

Each is the other's gradient. The same leg therefore takes tokens to their experts and gradients of
the answers; and brings home answers, gradients of the tokens and those of the gate's weights. A leg
knows no autograd, so that a scheduler can have several under way at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.dispatch.channel import Channel, Pending
from moe.dispatch.payload import Kind
from moe.segment_sum import segment_sum


@dataclass(frozen=True, slots=True)
class Leg:
    """Where rows go from here and come here from; every rank of the channel has one.

    Attributes:
        sources: int64 [num_sent], the row that each sent row copies; those for rank 0 first and,
            for one rank, in the order of the rows.
        copies: int64 [num_sent], the same sent rows in the order of what they copy.
        starts: int64 [num_rows + 1], where each row's copies start in `copies`.
        send_splits, receive_splits: rows to and from each rank of the channel.
    """

    channel: Channel
    sources: Tensor
    copies: Tensor
    starts: Tensor
    send_splits: tuple[int, ...]
    receive_splits: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """Rows that a start is given, and that come home."""
        return self.starts.numel() - 1

    @property
    def num_received(self) -> int:
        """Rows that arrive, and that a start home is given."""
        return sum(self.receive_splits)

    def start(self, rows: Tensor, kind: Kind = "rows") -> Pending:
        """Send [num_rows, ...]; [num_received, ...] arrive, those from rank 0 first."""
        assert rows.shape[0] == self.num_rows
        sent = rows.detach().index_select(0, self.sources)
        return self.channel.start(sent, self.send_splits, self.receive_splits, kind)

    def start_home(self, rows: Tensor, kind: Kind = "rows") -> Pending:
        """Send back [num_received, width]; [num_rows, width] arrive, sums over each row's copies,
        made in float32 at least."""
        assert rows.shape[0] == self.num_received
        return _Homecoming(
            self.channel.start(rows, self.receive_splits, self.send_splits, kind), self
        )


@dataclass(frozen=True, slots=True)
class _Homecoming:
    arriving: Pending
    leg: Leg

    def wait(self) -> Tensor:
        return segment_sum(self.arriving.wait(), self.leg.copies, self.leg.starts)


def make_leg(
    channel: Channel,
    wanted: Tensor,
    *,
    send_splits: tuple[int, ...],
    receive_splits: tuple[int, ...],
) -> Leg:
    """The leg that sends each row once to every rank that wants it.

    Args:
        wanted: bool [num_rows, number of ranks].
        send_splits: sums of its columns; the host knows them, so that no device is waited for.
    """
    num_sent = sum(send_splits)
    by_rank = wanted.t()
    place = (by_rank.reshape(-1).cumsum(0) - 1).view(by_rank.shape)
    row = torch.arange(wanted.shape[0], device=wanted.device)
    starts = torch.zeros(wanted.shape[0] + 1, dtype=torch.int64, device=wanted.device)
    torch.cumsum(wanted.sum(dim=1), dim=0, out=starts[1:])
    return Leg(
        channel=channel,
        sources=_where(row.expand(by_rank.shape), by_rank, num_sent),
        copies=_where(place.t(), wanted, num_sent),
        starts=starts,
        send_splits=send_splits,
        receive_splits=receive_splits,
    )


def _where(values: Tensor, mask: Tensor, num_true: int) -> Tensor:
    """values[mask], row by row, where `num_true` of them are known to be: no device is asked."""
    flat = mask.reshape(-1)
    slots = torch.where(flat, flat.cumsum(0) - 1, num_true)
    chosen = values.new_empty(num_true + 1)
    chosen.scatter_(0, slots, values.reshape(-1))
    return chosen[:num_true]
