"""What the ring benchmark times: batches, a pass over them, and passes that lack one half."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel.attention.block import Attended, BlockKernels
from parallel.attention.packed import packed_attention
from parallel.attention.shared_pass import SharedPass
from parallel.attention.shared_rows import SharedRows, shared_rows
from parallel.comm.exchange import Exchange, Message, Round
from parallel.plan.cuts import even_cut
from parallel.plan.records import MicroBatch, Piece, StepPlan
from parallel.plan.rings import RowLayout, row_layouts

# Parts of all ranks' tokens that are shared by all of them; whole documents fill up each rank.
BATCHES = {
    "one sequence": (1.0,),
    "three sequences": (0.5, 0.3, 0.2),
    "one and whole documents": (0.5,),
}
DOCUMENT_PART = 0.07
"""Tokens of a whole document, as a part of a rank's tokens."""


@dataclass(frozen=True)
class Shape:
    num_heads: int
    num_query_groups: int
    head_dim: int
    dtype: str

    def tensors(self, num_tokens: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """query, key, value and the gradient of the output."""
        heads = (self.num_heads, self.num_query_groups, self.num_query_groups, self.num_heads)
        dtype = getattr(torch, self.dtype)
        query, key, value, grad = (
            torch.randn(num_tokens, num, self.head_dim).to(device=device, dtype=dtype)
            for num in heads
        )
        return query, key, value, grad


def batch_layouts(name: str, *, num_ranks: int, tokens_per_rank: int) -> list[RowLayout]:
    """One micro-batch a rank: shared sequences cut head to tail, then whole documents."""
    total = num_ranks * tokens_per_rank
    # Whole parts, so that no rank gets a token more than another.
    num_parts = 2 * num_ranks
    lengths = [int(part * total) // num_parts * num_parts for part in BATCHES[name]]
    pieces: list[list[Piece]] = [[] for _ in range(num_ranks)]
    for sequence, length in enumerate(lengths):
        for rank, parts in enumerate(even_cut(sequence, length, num_ranks)):
            pieces[rank] += parts
    for mine in pieces:
        left = tokens_per_rank - sum(piece.num_tokens for piece in mine)
        while left > 0:
            length = min(left, max(1, int(DOCUMENT_PART * tokens_per_rank)))
            mine.append(Piece(len(lengths), 0, length))
            lengths.append(length)
            left -= length
    batches = tuple((MicroBatch(tuple(mine)),) for mine in pieces)
    plan = StepPlan(tuple(lengths), tokens_per_rank, batches)
    plan.check()
    return [row_layouts(plan, rank)[0] for rank in range(num_ranks)]


def num_pairs(layouts: Sequence[RowLayout]) -> int:
    """Pairs of query and key of all ranks."""
    pieces = {piece for layout in layouts for piece in layout.pieces}
    return sum((p.start + p.end + 1) * p.num_tokens // 2 for p in pieces)


def hop_share(layouts: Sequence[RowLayout]) -> float:
    """Part of the computation during which a block is under way: all hops, of shared sequences."""
    whole = {piece for layout in layouts for piece in layout.whole}
    alone = sum((piece.num_tokens + 1) * piece.num_tokens // 2 for piece in whole)
    return (1 - 1 / len(layouts)) * (1 - alone / num_pairs(layouts))


class SilentExchange(Exchange):
    """Sends nothing. What should have come is what stands in the buffers."""

    def post(self, messages: Sequence[Message]) -> Round:
        return Round()


class NoKernels:
    """`BlockKernels` that compute nothing."""

    def documents_forward(self, *args: Any, **kwargs: Any) -> None: ...

    def documents_backward(self, *args: Any, **kwargs: Any) -> None: ...

    def rectangles_forward(self, *args: Any, **kwargs: Any) -> None: ...

    def rectangles_backward(self, *args: Any, **kwargs: Any) -> None: ...


def one_pass(
    rows: SharedRows, exchange: Exchange, kernels: BlockKernels, tensors: tuple[Tensor, ...]
) -> None:
    """Forward + backward of one layer."""
    query, key, value, grad = tensors
    shared_pass = SharedPass(rows, exchange, kernels)
    answer = shared_pass.forward(query, key, value)
    attended = Attended(grad, query, answer.output, answer.log_sum_exp)
    shared_pass.backward(attended, key, value, answer.heads)


def whole_documents(layouts: Sequence[RowLayout], device: torch.device) -> SharedRows:
    """All sequences of the batch as whole documents on one rank."""
    pieces = {piece for layout in layouts for piece in layout.pieces}
    ends: dict[int, int] = {}
    for piece in pieces:
        ends[piece.sequence] = max(piece.end, ends.get(piece.sequence, 0))
    whole = tuple(Piece(sequence, 0, end) for sequence, end in sorted(ends.items()))
    return shared_rows(RowLayout(whole, (), rank=0), device=device)


def alone(rows: SharedRows, tensors: tuple[Tensor, ...]) -> None:
    """Forward + backward of whole documents, as a rank without partners computes them."""
    query, key, value = (x.detach().requires_grad_() for x in tensors[:3])
    output = packed_attention(query, key, value, rows=rows, exchange=None)
    torch.autograd.grad(output, (query, key, value), tensors[3])


def fill_buffers(
    exchange: Exchange,
    dtype: torch.dtype,
    all_rows: Sequence[SharedRows],
    shape: Shape,
    device: torch.device,
) -> None:
    """Numbers where messages would have come: fresh memory may hold anything, NaN too."""
    num_rows = max(step.num_rows for rows in all_rows for step in rows.steps)
    names = ("odd key and value", "even gradients", "odd gradients", "received gradients")
    for name in names:
        size = (num_rows, 2, shape.num_query_groups, shape.head_dim)
        exchange.buffer(name, size, dtype=dtype, device=device).normal_()
