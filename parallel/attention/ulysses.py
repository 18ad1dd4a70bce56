"""Ulysses: ranks that share sequences exchange heads instead of passing keys and values round.

Each of a ring's N ranks sends every other one its rows of 1/N of the heads (query heads together
with the groups they read), computes causal attention of whole sequences for its own share of heads,
and sends the outputs back (DeepSpeed Ulysses, arXiv 2309.14509). A rank sends
(2 h_q + 2 h_kv) t (N - 1) / N numbers for t rows, against 2 h_kv t (N - 1) of a ring: less where N
is large or keys have as many heads as queries. N must divide the number of query groups.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.attention.shared_rows import UlyssesRows
from parallel.comm.exchange import Exchange, Message


class HeadExchange:
    """One all-to-all of some tensors of a ring: rows to heads or heads to rows.

    name: tells its buffers from those of other exchanges that are under way at the same time.
    """

    def __init__(self, rows: UlyssesRows, exchange: Exchange, *, name: str) -> None:
        self._rows, self._exchange, self._name = rows, exchange, name
        self._received: list[Tensor] = []

    def to_heads(self, tensors: Sequence[Tensor]) -> list[Message]:
        """Send this rank's rows, [num_own, heads, head_dim] each with its own number of heads."""
        rows = self._rows
        self._num_heads = [x.shape[1] // len(rows.ranks) for x in tensors]
        num_own, head_dim = tensors[0].shape[0], tensors[0].shape[2]
        width = sum(self._num_heads)
        like = tensors[0]
        outgoing = self._buffer("sent", (len(rows.ranks), num_own, width, head_dim), like)
        incoming = self._buffer("received", (rows.documents.num_tokens, width, head_dim), like)
        for member in range(len(rows.ranks)):
            first = 0
            for x, num in zip(tensors, self._num_heads, strict=True):
                outgoing[member, :, first : first + num] = x[:, member * num : (member + 1) * num]
                first += num
        self._received = [incoming[part] for part in rows.member_rows]
        self._incoming = incoming
        return self._messages(list(outgoing.unbind()))

    def heads(self) -> list[Tensor]:
        """What arrived, of all tokens in sequence order: [num_tokens, heads / N, head_dim]."""
        ordered = self._incoming.index_select(0, self._rows.source)
        return list(torch.split(ordered, self._num_heads, dim=1))

    def to_rows(self, tensors: Sequence[Tensor]) -> list[Message]:
        """Send each rank its rows of what this one has of all tokens, in sequence order."""
        rows = self._rows
        self._num_heads = [x.shape[1] for x in tensors]
        width, head_dim, like = sum(self._num_heads), tensors[0].shape[2], tensors[0]
        num_tokens, num_own = rows.documents.num_tokens, rows.own.stop - rows.own.start
        outgoing = self._buffer("sent", (num_tokens, width, head_dim), like)
        incoming = self._buffer("received", (len(rows.ranks), num_own, width, head_dim), like)
        by_token = tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=1)
        torch.index_select(by_token, 0, rows.target, out=outgoing)
        self._received = list(incoming.unbind())
        return self._messages([outgoing[part] for part in rows.member_rows])

    def rows(self, targets: Sequence[Tensor]) -> None:
        """Write what arrived into this rank's rows, [num_own, heads, head_dim] each."""
        for member, block in enumerate(self._received):
            parts = torch.split(block, self._num_heads, dim=1)
            for target, part, num in zip(targets, parts, self._num_heads, strict=True):
                target[:, member * num : (member + 1) * num] = part

    def _messages(self, outgoing: list[Tensor]) -> list[Message]:
        messages = []
        for member, rank in enumerate(self._rows.ranks):
            if member == self._rows.position:
                self._received[member].copy_(outgoing[member])
                continue
            messages.append(Message(outgoing[member], rank, is_sent=True))
            messages.append(Message(self._received[member], rank, is_sent=False))
        return messages

    def _buffer(self, what: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        name = f"{self._name} {what}"
        return self._exchange.buffer(name, shape, dtype=like.dtype, device=like.device)
