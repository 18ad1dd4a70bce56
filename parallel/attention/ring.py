"""What goes round in ring attention: keys and values, and behind them their gradients.

Keys and values pass from rank to rank, and each rank computes what is there (Ring Attention,
arXiv 2310.01889). In backward they go round again, and the sums of their gradients, in float32,
follow one step behind until they are home with their owner.
"""

from torch import Tensor

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
        num_rows = max(num_rows, *(step.num_keys for step in rows.steps), 0)
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
        num_rows = max((step.num_rows for step in rows.steps), default=0)
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


def _messages(sent: Tensor, received: Tensor, transfers: tuple[Transfer, ...]) -> list[Message]:
    messages = []
    for transfer in transfers:
        messages.append(Message(sent[transfer.sent], transfer.next_rank, is_sent=True))
        messages.append(Message(received[transfer.received], transfer.previous_rank, is_sent=False))
    return messages
