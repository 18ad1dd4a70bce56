"""All-to-all of rows in one group, started and waited for apart, with its bytes counted.

Rank r sends its first `send_splits[0]` rows to rank 0, the next to rank 1, and so on, and receives
`receive_splits[i]` rows from rank i. What a rank keeps for itself is no traffic, but it is rounded
as what travels is, so that who has which expert makes no difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moe.dispatch.payload import Kind, Payload, Wire, pack_rows, rounded_rows, unpack_rows
from parallel.comm.exchange import Traffic


class Pending(Protocol):
    """Rows under way. What was given to start them may not be written before `wait`."""

    def wait(self) -> Tensor:
        """The rows; on a GPU the current stream waits for them, the host does not."""
        ...


@dataclass(frozen=True, slots=True)
class Arriving:
    """An all-to-all under way; `sent` is kept so that its memory is not used again too early.

    Attributes:
        dtype: of the rows, however they are written.
    """

    received: Tensor
    sent: Tensor
    work: dist.Work
    payload: Payload
    dtype: torch.dtype

    def wait(self) -> Tensor:
        self.work.wait()
        if self.payload == "none":
            return self.received
        return unpack_rows(self.received, payload=self.payload, dtype=self.dtype)


@dataclass(frozen=True, slots=True)
class Here:
    """Rows that did not have to travel."""

    rows: Tensor

    def wait(self) -> Tensor:
        return self.rows


@dataclass(slots=True)
class Channel:
    """One group and what this rank has sent over it to others.

    Its ranks start the same exchanges in the same order. It may serve one thread at a time.

    Attributes:
        rows: traffic of rows and their gradients.
    """

    group: dist.ProcessGroup
    wire: Wire = field(default_factory=Wire)
    rows: Traffic = field(default_factory=Traffic)
    numbers: Traffic = field(default_factory=Traffic)

    @property
    def size(self) -> int:
        return self.group.size()

    def start(
        self, rows: Tensor, send_splits: Sequence[int], receive_splits: Sequence[int], kind: Kind
    ) -> Pending:
        """Send `rows`, those for rank 0 first; splits are rows."""
        payload = self.wire.payload_of(kind)
        rows = rows.detach()
        if self.size == 1:
            return Here(rounded_rows(rows, payload=payload))
        sent = rows.contiguous() if payload == "none" else pack_rows(rows, payload=payload)
        received = sent.new_empty((sum(receive_splits), *sent.shape[1:]))
        work = dist.all_to_all_single(
            received,
            sent,
            output_split_sizes=list(receive_splits),
            input_split_sizes=list(send_splits),
            group=self.group,
            async_op=True,
        )
        self._count(sent, send_splits, kind)
        return Arriving(received, sent, work, payload, rows.dtype)

    def _count(self, rows: Tensor, send_splits: Sequence[int], kind: Kind) -> None:
        own = self.group.rank()
        lengths = [length for rank, length in enumerate(send_splits) if length and rank != own]
        traffic = self.numbers if kind == "numbers" else self.rows
        traffic.num_messages_sent += len(lengths)
        row_bytes = rows.element_size() * (rows[0].numel() if len(rows) else 0)
        traffic.num_bytes_sent += sum(lengths) * row_bytes
