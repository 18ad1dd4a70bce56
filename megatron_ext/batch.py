"""One micro-batch of a plan as the tensors that a model takes.

The tokens of all pieces stand one behind the other in one row; attention learns from the document
lengths where one ends, and positions restart there. Padding at the end, if any, belongs to no
document and counts in no loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from numpy.typing import NDArray
from torch import Tensor

from parallel.attention.rotary import RotaryTable, rotary_table

IntArray = NDArray[np.int64]


@dataclass
class PackedDocuments(PackedSeqParams):
    """megatron's packing record with what our attention needs, made once per micro-batch.

    Attributes:
        cu_seqlens: borders of the documents as host integers, (0, l0, l0+l1, ...).
        max_seqlen: longest document in tokens.
        rotary: cosines and sines of every token's angles, shared by all layers.
    """

    cu_seqlens: tuple[int, ...] = ()
    max_seqlen: int = 0
    rotary: RotaryTable | None = None


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Tensors of one micro-batch, each [1, num_tokens]."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    positions: Tensor
    documents: PackedDocuments
    num_unmasked_tokens: int


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def pack(
    pieces: list[tuple[IntArray, IntArray, int]],
    *,
    num_tokens: int,
    head_dim: int,
    rotary_base: float,
    device: torch.device,
) -> PackedBatch:
    """Lay pieces behind each other and pad them to `num_tokens`.

    Args:
        pieces: (tokens, labels, first position) of each piece.
        num_tokens: length of the row; at least the tokens of all pieces.
        head_dim, rotary_base: of the rotary positions.
        device: where the tensors go.
    """
    lengths = [len(tokens) for tokens, _, _ in pieces]
    used = sum(lengths)
    assert used <= num_tokens, (used, num_tokens)
    tokens = np.zeros(num_tokens, dtype=np.int64)
    labels = np.zeros(num_tokens, dtype=np.int64)
    positions = np.zeros(num_tokens, dtype=np.int64)
    borders = [0]
    for piece_tokens, piece_labels, first in pieces:
        start, end = borders[-1], borders[-1] + len(piece_tokens)
        tokens[start:end] = piece_tokens
        labels[start:end] = piece_labels
        positions[start:end] = np.arange(first, first + end - start)
        borders.append(end)
    mask = np.zeros(num_tokens, dtype=np.float32)
    mask[:used] = 1.0
    position_row = torch.from_numpy(positions).to(device)
    cu_seqlens = torch.tensor(borders, dtype=torch.int32).to(device, non_blocking=True)
    longest = max(lengths, default=0)
    documents = PackedDocuments(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        cu_seqlens=tuple(borders),
        max_seqlen=longest,
        rotary=rotary_table(position_row, head_dim=head_dim, rotary_base=rotary_base),
    )
    return PackedBatch(
        tokens=torch.from_numpy(tokens).to(device)[None],
        labels=torch.from_numpy(labels).to(device)[None],
        loss_mask=torch.from_numpy(mask).to(device)[None],
        positions=position_row[None],
        documents=documents,
        num_unmasked_tokens=used,
    )
