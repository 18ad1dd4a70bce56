"""Ring attention: keys and values travel from rank to rank, and each rank computes what is there.

Forward merges the parts over the blocks that come by (Ring Attention, arXiv 2310.01889). Backward
lets keys and values go round again, computes each block's probabilities from the log-sum-exp over
all keys, and sends the sums of their gradients, in float32, one step behind the blocks until they
are home with their owner. While a block is computed, the next one is under way; while the first
comes, the whole documents are computed, and while the last gradients go home, the rank's own rows.

What is in which round (see `parallel.comm.exchange`): round r brings the blocks of step r and the
gradients of step r - 1. It is posted before step r - 1 is computed and awaited after it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.attention.block import Attended, BlockKernels, Gradients
from parallel.attention.ring_steps import Transfer
from parallel.attention.shared_rows import SharedRows
from parallel.comm.exchange import Exchange, Message


class TravellingBlocks:
    """Keys and values of the rings' ranks as they come by: [rows, key or value, groups, head_dim].

    The blocks of even and odd steps take turns in two buffers. key, value: this rank's shared rows.
    """

    def __init__(self, key: Tensor, value: Tensor, rows: SharedRows, exchange: Exchange) -> None:
        self._rows = rows
        num_rows = max((place.stop for _, place in rows.own_rows), default=0)
        num_rows = max((num_rows, *(step.num_keys for step in rows.steps)))
        self._buffers = tuple(
            exchange.buffer(name, (num_rows, 2, *key.shape[1:]), dtype=key.dtype, device=key.device)
            for name in ("even key and value", "odd key and value")
        )
        for mine, place in rows.own_rows:
            self._buffers[0][place, 0] = key[mine]
            self._buffers[0][place, 1] = value[mine]

    def messages(self, step: int) -> list[Message]:
        """What brings the blocks of a step, counted from 1; nothing behind the last."""
        if step > len(self._rows.steps):
            return []
        sent, received = self._buffers[(step - 1) % 2], self._buffers[step % 2]
        return _messages(sent, received, self._rows.steps[step - 1].transfers)

    def here(self, step: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a step, [num_keys, groups, head_dim]."""
        block = self._buffers[step % 2][: self._rows.steps[step - 1].num_keys]
        return block[:, 0], block[:, 1]


class TravellingGradients:
    """Sums of the gradients of keys and values, one step behind their blocks; laid out like these.

    own: where this rank's sums end up, the gradients of key and value of its shared rows.
    """

    def __init__(self, own: tuple[Tensor, Tensor], rows: SharedRows, exchange: Exchange) -> None:
        self._own, self._rows = own, rows
        num_rows = max(step.num_rows for step in rows.steps)
        shape = (num_rows, 2, *own[0].shape[1:])
        self._even, self._odd, self._received = (
            exchange.buffer(name, shape, dtype=own[0].dtype, device=own[0].device)
            for name in ("even gradients", "odd gradients", "received gradients")
        )

    def messages(self, step: int) -> list[Message]:
        """What brings the sums of this step's owners over the steps before; from step 2 on."""
        if step < 2 or step > len(self._rows.steps):
            return []
        entry = self._rows.steps[step - 1]
        transfers = entry.transfers + entry.homecoming_transfers
        return _messages(self._sums(step - 1), self._received, transfers)

    def cleared(self, step: int) -> tuple[Tensor, Tensor]:
        """Zeros that this step's gradients of key and value are added to."""
        block = self._sums(step)[: self._rows.steps[step - 1].num_keys].zero_()
        return block[:, 0], block[:, 1]

    def absorb(self, step: int) -> None:
        """Add what a step's messages brought: to the sums that go on, or to the owner's."""
        if step < 2:
            return
        entry = self._rows.steps[step - 1]
        self._sums(step)[: entry.num_keys] += self._received[: entry.num_keys]
        for homecoming in entry.homecomings:
            arrived = self._received[homecoming.received]
            for index, own in enumerate(self._own):
                own[homecoming.own] += arrived[:, index]

    def _sums(self, step: int) -> Tensor:
        return self._odd if step % 2 else self._even


@dataclass(frozen=True, slots=True)
class RingPass:
    """Forward and backward over one micro-batch's rows; shapes as `packed_attention`."""

    rows: SharedRows
    exchange: Exchange
    kernels: BlockKernels

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Output in query's dtype, with zeros behind the last row, and log-sum-exp."""
        rows, shared = self.rows, self.rows.shared
        precision = torch.promote_types(query.dtype, torch.float32)
        output = torch.empty_like(query)
        output[rows.num_rows :] = 0
        log_sum_exp = query.new_empty((query.shape[1], rows.num_rows), dtype=precision)
        # In float32 the parts are merged in the output itself.
        merged = output[shared]
        if merged.dtype != precision:
            merged = torch.empty_like(merged, dtype=precision)
        merged_log_sum_exp = log_sum_exp[:, shared]
        own = query[shared], key[shared], value[shared]

        blocks = TravellingBlocks(own[1], own[2], rows, self.exchange)
        under_way = self.exchange.post(blocks.messages(1))
        self.kernels.documents_forward(output, log_sum_exp, query, key, value, rows.whole)
        for documents in rows.own:
            self.kernels.documents_forward(merged, merged_log_sum_exp, *own, documents)
        for step, rectangles in enumerate(rows.rectangles, start=1):
            under_way.wait()
            under_way = self.exchange.post(blocks.messages(step + 1))
            keys, values = blocks.here(step)
            self.kernels.rectangles_forward(
                merged, merged_log_sum_exp, own[0], keys, values, rectangles
            )
        if merged.dtype != output.dtype:
            output[shared] = merged
        return output, log_sum_exp

    def backward(self, attended: Attended, key: Tensor, value: Tensor) -> Gradients:
        """Gradients of query, key and value in their dtype, zero behind the last row.

        attended: of all rows, the log-sum-exp as `forward` gave it.
        """
        rows, shared = self.rows, self.rows.shared
        gradients = (
            torch.empty_like(attended.query),
            torch.empty_like(key),
            torch.empty_like(value),
        )
        for gradient in gradients:
            gradient[rows.num_whole :] = 0
        sums = _sums(gradients, shared)
        own = attended.rows(shared)
        own_key, own_value = key[shared], value[shared]

        blocks = TravellingBlocks(own_key, own_value, rows, self.exchange)
        travelling = TravellingGradients((sums[1], sums[2]), rows, self.exchange)
        under_way = self.exchange.post(blocks.messages(1))
        self.kernels.documents_backward(gradients, attended, key, value, rows.whole)
        for step, rectangles in enumerate(rows.rectangles, start=1):
            under_way.wait()
            travelling.absorb(step - 1)
            under_way = self.exchange.post(blocks.messages(step + 1) + travelling.messages(step))
            keys, values = blocks.here(step)
            self.kernels.rectangles_backward(
                (sums[0], *travelling.cleared(step)), own, keys, values, rectangles
            )
        for documents in rows.own:
            self.kernels.documents_backward(sums, own, own_key, own_value, documents)
        under_way.wait()
        travelling.absorb(len(rows.steps))
        if sums[0].dtype != gradients[0].dtype:
            for gradient, total in zip(gradients, sums, strict=True):
                gradient[shared] = total
        return gradients


def _messages(sent: Tensor, received: Tensor, transfers: tuple[Transfer, ...]) -> list[Message]:
    messages = []
    for transfer in transfers:
        messages.append(Message(sent[transfer.sent], transfer.next_rank, is_sent=True))
        messages.append(Message(received[transfer.received], transfer.previous_rank, is_sent=False))
    return messages


def _sums(gradients: Gradients, shared: slice) -> Gradients:
    """Zeros for the shared rows, at least float32: where that is the dtype, the rows themselves."""
    precision = torch.promote_types(gradients[0].dtype, torch.float32)
    if gradients[0].dtype == precision:
        return gradients[0][shared], gradients[1][shared], gradients[2][shared]
    query, key, value = (torch.zeros_like(x[shared], dtype=precision) for x in gradients)
    return query, key, value
