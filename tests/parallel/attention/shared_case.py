"""Attention problems whose sequences several ranks share, and their answers put together again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.attention.local import Backend
from parallel.attention.packed import packed_attention
from parallel.attention.shared_rows import shared_rows
from parallel.comm.exchange import Exchange
from parallel.plan.records import MicroBatch, Piece, StepPlan
from parallel.plan.rings import RowLayout, row_layouts
from parallel.plan.split import head_tail_pieces
from tests.parallel.attention.packed_case import PackedCase


@dataclass(frozen=True, slots=True)
class SharedCase:
    """Sequences and, for each rank, its pieces of them; one micro-batch a rank."""

    packed: PackedCase
    """The sequences in one row; its padding goes to every rank."""
    pieces: tuple[tuple[Piece, ...], ...]
    ulysses_rings: tuple[tuple[int, ...], ...] = ()
    backend: Backend = "auto"

    @property
    def num_ranks(self) -> int:
        return len(self.pieces)

    def layout(self, rank: int) -> RowLayout:
        plan = StepPlan(
            lengths=self.packed.lengths,
            tokens_per_rank=sum(self.packed.lengths),
            micro_batches=tuple((MicroBatch(pieces),) for pieces in self.pieces),
        )
        plan.check()
        return row_layouts(plan, rank)[0]

    def indices(self, rank: int) -> Tensor:
        """For each row of a rank but padding, its place in the row of all sequences."""
        starts = self.packed.cu_seqlens
        parts = [
            torch.arange(starts[piece.sequence] + piece.start, starts[piece.sequence] + piece.end)
            for piece in self.layout(rank).pieces
        ]
        return torch.cat([torch.empty(0, dtype=torch.long), *parts])


def head_tail(
    lengths: Sequence[int], rings: Sequence[Sequence[int]], num_ranks: int
) -> tuple[tuple[Piece, ...], ...]:
    """Each rank's pieces, sequence i cut head to tail for the ranks rings[i]."""
    found: list[list[Piece]] = [[] for _ in range(num_ranks)]
    for sequence, (length, ranks) in enumerate(zip(lengths, rings, strict=True)):
        for rank, pieces in zip(ranks, head_tail_pieces(sequence, length, len(ranks)), strict=True):
            found[rank] += pieces
    return tuple(tuple(pieces) for pieces in found)


def on_rank(cases: Sequence[SharedCase], dtype: torch.dtype) -> list[list[Tensor]]:
    """Run in every rank: output and gradients of its rows, padding included, case by case."""
    rank = torch.distributed.get_rank()
    return [_results(case, rank, dtype) for case in cases]


def _results(case: SharedCase, rank: int, dtype: torch.dtype) -> list[Tensor]:
    if rank >= case.num_ranks:
        return []
    own = case.indices(rank)
    # What stands in padding must not matter.
    mine = [
        torch.cat((x.detach()[own], x.new_full((case.packed.padding, *x.shape[1:]), torch.nan)))
        for x in case.packed.tensors(dtype=dtype)
    ]
    leaves = [x.requires_grad_() for x in mine[:3]]
    output = packed_attention(
        *leaves,
        rows=shared_rows(
            case.layout(rank), device=torch.device("cpu"), ulysses_rings=case.ulysses_rings
        ),
        exchange=Exchange(None),
        softmax_scale=case.packed.softmax_scale,
        backend=case.backend,
    )
    # With padding alone a leaf may not be used at all.
    grads = torch.autograd.grad(output, leaves, mine[3], allow_unused=True, materialize_grads=True)
    return [output.detach(), *grads]


def together(case: SharedCase, found: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """What the ranks found, in the order of `case.packed`; padding must be zero."""
    whole = []
    for number in range(4):
        parts = [results[number] for results in found[: case.num_ranks]]
        answer = parts[0].new_full((case.packed.num_tokens, *parts[0].shape[1:]), torch.nan)
        answer[case.packed.cu_seqlens[-1] :] = 0
        for rank, part in enumerate(parts):
            own = case.indices(rank)
            assert not part[len(own) :].any(), f"rank {rank} left something in its padding"
            answer[own] = part[: len(own)]
        whole.append(answer)
    return whole


Run = Callable[..., list[list[list[Tensor]]]]
