"""One micro-batch of a plan as the tensors that a model takes.

The tokens of all pieces stand one behind the other in one row: first whole sequences, then the
pieces of sequences that other ranks share (`parallel.plan.rings`). Attention learns from the layout
what sees what; positions are those within the sequence. Padding at the end, if any, belongs to no
sequence and counts in no loss.

A row is read on the host, ahead of time, and goes to the device when its turn comes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from numpy.typing import NDArray
from torch import Tensor

from parallel.attention.record_tensors import moved
from parallel.attention.rotary import RotaryTable, rotary_table
from parallel.attention.shared_rows import SharedRows, shared_rows
from parallel.comm.exchange import Exchange
from parallel.plan.rings import RowLayout

IntArray = NDArray[np.int64]
# A token's number in its step: that of its sequence, then its position.
_POSITION_BITS = 32


@dataclass
class PackedDocuments(PackedSeqParams):
    """megatron's packing record with what our layers need, made once per micro-batch.

    Attributes:
        rows: which rows see which, here and on the ranks that share sequences with this one.
        exchange: the way to the data-parallel ranks, over which shared sequences travel.
        rotary: cosines and sines of every token's angles, shared by all layers.
        offload_ratio: part of the saved activations' tokens that go to host memory.
        sequence_lengths: tokens of each sequence that are here, in the order of the row.
        row_length: of the whole row, padding included.
        token_ids: int64 [row_length], tells the tokens of a step apart, whoever computes them.
    """

    rows: SharedRows | None = None
    exchange: Exchange | None = None
    rotary: RotaryTable | None = None
    offload_ratio: float = 0.0
    sequence_lengths: tuple[int, ...] = ()
    row_length: int = 0
    token_ids: Tensor | None = None

    @cached_property
    def sequences(self) -> Tensor:
        """int64 [row_length] on the device: for each row the number of its sequence, from 0.

        Padding has the number behind the last one.
        """
        assert self.rows is not None
        lengths = (*self.sequence_lengths, self.row_length - sum(self.sequence_lengths))
        numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        return numbers.to(self.rows.whole.device_cu_seqlens.device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Tensors of one micro-batch, each [1, num_tokens], on the device."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    documents: PackedDocuments
    num_unmasked_tokens: int


@dataclass(frozen=True, slots=True)
class HostBatch:
    """One micro-batch as it was read: int64 tensors [num_tokens] on the host."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    token_ids: Tensor
    layout: RowLayout
    rows: SharedRows
    """What sees what, with index tensors on the host."""
    num_unmasked_tokens: int
    """The first rows; what follows is padding."""
    head_dim: int
    rotary_base: float

    def to(self, device: torch.device, *, exchange: Exchange | None = None) -> PackedBatch:
        """The tensors a model takes, with the angles of all positions.

        exchange: needed where the row has pieces of shared sequences.
        """
        layout = self.layout
        rows = self.rows if device.type == "cpu" else moved(self.rows, device)
        positions = self.positions.to(device, non_blocking=True)
        documents = PackedDocuments(
            qkv_format="thd",
            cu_seqlens_q=rows.whole.device_cu_seqlens,
            cu_seqlens_kv=rows.whole.device_cu_seqlens,
            max_seqlen_q=rows.whole.max_seqlen,
            max_seqlen_kv=rows.whole.max_seqlen,
            rows=rows,
            exchange=exchange,
            rotary=rotary_table(positions, head_dim=self.head_dim, rotary_base=self.rotary_base),
            offload_ratio=layout.offload_ratio,
            sequence_lengths=sequence_lengths(layout),
            row_length=len(self.tokens),
            token_ids=self.token_ids.to(device, non_blocking=True),
        )
        return PackedBatch(
            tokens=self.tokens.to(device, non_blocking=True)[None],
            labels=self.labels.to(device, non_blocking=True)[None],
            positions=positions[None],
            documents=documents,
            num_unmasked_tokens=self.num_unmasked_tokens,
        )


def sequence_lengths(layout: RowLayout) -> tuple[int, ...]:
    """How many tokens of each sequence a row holds; its pieces stand one behind the other."""
    lengths: dict[int, int] = {}
    for piece in layout.pieces:
        lengths[piece.sequence] = lengths.get(piece.sequence, 0) + piece.num_tokens
    return tuple(lengths.values())


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def pack(
    pieces: list[tuple[IntArray, IntArray]],
    layout: RowLayout,
    *,
    num_tokens: int,
    head_dim: int,
    rotary_base: float,
    pin_memory: bool = False,
) -> HostBatch:
    """Lay pieces behind each other and pad them to `num_tokens`.

    Args:
        pieces: (tokens, labels) of each piece of the layout, in its order.
        num_tokens: length of the row; at least the tokens of all pieces.
        head_dim, rotary_base: of the rotary positions.
    """
    rows = np.zeros((4, num_tokens), dtype=np.int64)
    end = 0
    for piece, (tokens, labels) in zip(layout.pieces, pieces, strict=True):
        start, end = end, end + len(tokens)
        assert end <= num_tokens, (end, num_tokens)
        rows[0, start:end] = tokens
        rows[1, start:end] = labels
        rows[2, start:end] = np.arange(piece.start, piece.end)
        rows[3, start:end] = rows[2, start:end] + (piece.sequence << _POSITION_BITS)
    host = torch.from_numpy(rows)
    if pin_memory:
        host = host.pin_memory()
    return HostBatch(
        tokens=host[0],
        labels=host[1],
        positions=host[2],
        token_ids=host[3],
        layout=layout,
        rows=shared_rows(layout, device=host.device),
        num_unmasked_tokens=end,
        head_dim=head_dim,
        rotary_base=rotary_base,
    )
