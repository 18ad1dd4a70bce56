"""All-to-all of rows in one group, started and waited for apart, with its bytes counted.

Rank r sends its first `send_splits[0]` rows to rank 0, the next to rank 1, and so on, and receives
`receive_splits[i]` rows from rank i. What a rank keeps for itself is no traffic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch.distributed as dist
from torch import Tensor

from parallel.comm.exchange import Traffic

Kind = Literal["rows", "numbers"]
"""What travels: rows of hidden_size, or the few numbers that say where they belong."""


class Pending(Protocol):
    """Rows under way. What was given to start them may not be written before `wait`."""

    def wait(self) -> Tensor:
        """The rows; on a GPU the current stream waits for them, the host does not."""
        ...


@dataclass(frozen=True, slots=True)
class Arriving:
    """An all-to-all under way; `sent` is kept so that its memory is not used again too early."""

    received: Tensor
    sent: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.received


@dataclass(slots=True)
class Channel:
    """One group and what this rank has sent over it to others.

    Its ranks start the same exchanges in the same order. It may serve one thread at a time.
    """

    group: dist.ProcessGroup
    rows: Traffic = field(default_factory=Traffic)
    numbers: Traffic = field(default_factory=Traffic)

    @property
    def size(self) -> int:
        return self.group.size()

    def start(
        self, rows: Tensor, send_splits: Sequence[int], receive_splits: Sequence[int], kind: Kind
    ) -> Arriving:
        """Send `rows`, those for rank 0 first; splits are rows."""
        rows = rows.detach().contiguous()
        if self.size == 1:
            return Arriving(rows, rows, None)
        received = rows.new_empty((sum(receive_splits), *rows.shape[1:]))
        work = dist.all_to_all_single(
            received,
            rows,
            output_split_sizes=list(receive_splits),
            input_split_sizes=list(send_splits),
            group=self.group,
            async_op=True,
        )
        self._count(rows, send_splits, kind)
        return Arriving(received, rows, work)

    def _count(self, rows: Tensor, send_splits: Sequence[int], kind: Kind) -> None:
        own = self.group.rank()
        lengths = [length for rank, length in enumerate(send_splits) if length and rank != own]
        traffic = self.rows if kind == "rows" else self.numbers
        traffic.num_messages_sent += len(lengths)
        row_bytes = rows.element_size() * (rows[0].numel() if len(rows) else 0)
        traffic.num_bytes_sent += sum(lengths) * row_bytes
